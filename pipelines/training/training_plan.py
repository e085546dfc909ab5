"""What a training of the prior will take: memory, work, time, money, failures, network.

All of it is arithmetic on the settings, done before the first step. What nobody can know from them
(a price, a disk's rate) is left out unless it is given.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from models.prior import PriorConfig
from pipelines.training.plan_memory import Device, Kinds, Setting, parameter_counts, peak_memory
from pipelines.training.plan_network import sent_bytes, vector_bytes
from pipelines.training.prior_training import PriorTraining

GIB = 2**30
# MiB by nvidia-smi, and TFLOP/s of dense 16-bit products by the data sheets. V100: the paper's.
CARDS = {"H200": (143_771, 989), "H100": (81_559, 989), "V100": (16_160, 125)}


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What `--dry-run` takes for granted; nothing of it changes a training."""

    card: Literal["H200", "H100", "V100"] = "H200"
    """Its memory and its rate."""
    gpu_memory_gib: float = 0.0
    """Of another card; 0: of this one."""
    reserved_gib: float = 4.0
    """Left for the CUDA context, the network's buffers and the allocator's gaps: a guess."""
    gpus_per_node: int = 8
    mfu: tuple[float, ...] = (0.3, 0.4, 0.5)
    """Shares of the card's rate that the model's own FLOP may reach. 0.33 to 0.48 are published for
    models of that size on H100s (torchtitan, Megatron-LM, llm-foundry)."""
    price_per_gpu_hour: float = 0.0
    """In your currency; 0: no prices."""
    gpu_hours_per_failure: float = 50_700.0
    """Of unexpected interruptions: 419 in 54 days on 16,384 H100s (Llama 3, section 3.3.4)."""
    checkpoint_gb_per_second: float = 0.0
    """Rate at which all workers together write a checkpoint; 0: no interval is planned."""
    node_gbit_per_second: float = 3200.0
    """Of a machine's network: 8 adapters of 400 Gb/s."""

    def __post_init__(self) -> None:
        if self.gpus_per_node < 1 or not self.mfu or not all(0 < mfu <= 1 for mfu in self.mfu):
            raise ValueError(
                "plan.gpus_per_node must be at least 1 and every plan.mfu in (0, 1], "
                f"got {self.gpus_per_node}, {self.mfu}"
            )
        if self.gpu_hours_per_failure <= 0 or self.node_gbit_per_second <= 0:
            raise ValueError(
                "plan.gpu_hours_per_failure and plan.node_gbit_per_second must be above 0, "
                f"got {self.gpu_hours_per_failure}, {self.node_gbit_per_second}"
            )

    @property
    def memory(self) -> float:
        """Bytes that a worker may use."""
        gib = self.gpu_memory_gib or CARDS[self.card][0] / 1024
        return (gib - self.reserved_gib) * GIB

    @property
    def flops(self) -> float:
        """A second, at an MFU of 1."""
        return CARDS[self.card][1] * 1e12


@dataclass(frozen=True)
class Duration:
    """At one MFU."""

    mfu: float
    gpu_hours: float
    days: float
    price: float
    failures: float
    seconds_per_update: float


@dataclass(frozen=True)
class Network:
    """Between machines, in an update."""

    whole_bytes: float
    """That a machine hands to the reduction when gradients are sent whole, in fp32."""
    compressed_bytes: float
    """With PowerSGD, whether it is on or not."""
    pays_below_gbit: float
    """A machine's Gb/s below which whole gradients take longer than the backward pass that hides
    them, at the highest MFU."""


@dataclass(frozen=True)
class TrainingPlan:
    """All figures."""

    setting: Setting
    config: PlanConfig
    parameters: int
    tokens: int
    flop: float
    """Of the model: 6 a parameter of a product and token, and attention's."""
    repeated_flop: float
    """Of recomputation, on top."""
    memory: Kinds
    checkpoint_bytes: float
    durations: tuple[Duration, ...]
    network: Network | None
    """None on one machine, and where a group spans several."""

    @property
    def peak(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.config.memory

    @property
    def group_spans_machines(self) -> bool:
        """Then weights are gathered over the network, which is not planned."""
        return self.setting.shards > self.config.gpus_per_node

    @property
    def hours_to_failure(self) -> float:
        return self.config.gpu_hours_per_failure / self.setting.workers

    def checkpoint_seconds(self) -> float:
        """That writing one takes; 0 if the rate is not given."""
        rate = self.config.checkpoint_gb_per_second * 1e9
        return self.checkpoint_bytes / rate if rate else 0.0

    def checkpoint_interval(self) -> float:
        """Seconds between checkpoints that lose the least: sqrt(2 · write · time to failure), by
        Young (1974) and, for long writes, less the write by Daly (2006)."""
        write = self.checkpoint_seconds()
        return max(math.sqrt(2 * write * self.hours_to_failure * 3600) - write, write)


def plan_training(
    model: PriorConfig,
    training: PriorTraining,
    workers: int,
    config: PlanConfig,
    device: Device = "cuda",
) -> TrainingPlan:
    """Raises ValueError for workers that the training cannot have."""
    setting = Setting(model=model, training=training, workers=workers, device=device)
    samples = training.steps * training.batch_samples
    flop = samples * flop_per_picture(model)
    repeated = samples * repeated_flop_per_picture(setting)
    durations = []
    for mfu in config.mfu:
        hours = flop / (mfu * config.flops) / 3600
        durations.append(
            Duration(
                mfu=mfu,
                gpu_hours=hours,
                days=hours / workers / 24,
                price=hours * config.price_per_gpu_hour,
                failures=hours / config.gpu_hours_per_failure,
                seconds_per_update=hours * 3600 / workers / training.steps,
            )
        )
    return TrainingPlan(
        setting=setting,
        config=config,
        parameters=int(sum(parameter_counts(model))),
        tokens=samples * model.stream_len,
        flop=flop,
        repeated_flop=repeated,
        memory={kind: size for kind, size in peak_memory(setting).items() if size},
        checkpoint_bytes=checkpoint_bytes(setting),
        durations=tuple(durations),
        network=_network(setting, config, min(d.seconds_per_update for d in durations)),
    )


def flop_per_picture(model: PriorConfig) -> float:
    """Forwards and backwards: 6 a number of every matrix that a token meets, and 12 a channel and
    key that it sees."""
    matrices, *_ = parameter_counts(model)
    text, image = model.text_len, model.image_len
    heads = model.d_model * ((text - 1) * model.text_vocab_size + image * model.image_vocab_size)
    return 6 * (matrices * model.stream_len + heads) + 12 * model.d_model * _seen_keys(model)


def repeated_flop_per_picture(setting: Setting) -> float:
    """A resblock's last product is not made again: 7 of its 12 d² are, where all is recomputed."""
    model = setting.model
    if setting.training.recompute == "none":
        return 0.0
    attention = 4 * model.d_model * _seen_keys(model)
    if setting.training.recompute == "selective":
        return attention
    matrices, *_ = parameter_counts(model)
    return 2 * matrices * 7 / 12 * model.stream_len + attention


def checkpoint_bytes(setting: Setting) -> float:
    """Weights, moments and average, once for all workers, and PowerSGD's errors."""
    training = setting.training
    matrices, vectors, root = parameter_counts(setting.model)
    moment = 4 if training.optimizer.moments == "fp32" else 2
    compressed = training.sharding.power_sgd.enabled and setting.workers > setting.shards
    each = 4 + 2 * moment + 4 + 4 * compressed
    return each * matrices + 16 * (vectors + root)


def _seen_keys(model: PriorConfig) -> float:
    """Keys that the queries of a picture see, in all layers."""
    text, image = model.text_len, model.image_len
    near = {
        "row": model.grid + 1,
        "column": (model.grid + 1) / 2,
        "conv": model.conv_kernel * (model.conv_kernel // 2) + model.conv_kernel // 2 + 1,
        "full": (image + 1) / 2,
    }
    return sum(text * (text + 1) / 2 + image * (text + near[kind]) for kind in model.kinds)


def _network(setting: Setting, config: PlanConfig, update_seconds: float) -> Network | None:
    """A ring hands each number on twice, less a share; every worker of a machine sends its shards.

    The reduction has the backward pass to hide behind, two thirds of an update.
    """
    nodes = setting.workers // config.gpus_per_node
    if nodes < 2 or setting.shards > config.gpus_per_node:
        return None
    sharding = setting.training.sharding
    shards = setting.shards
    sent = {}
    for enabled in (False, True):
        power_sgd = replace(sharding.power_sgd, enabled=enabled)
        each = sent_bytes(setting.model, replace(sharding, power_sgd=power_sgd), shards)
        sent[enabled] = config.gpus_per_node * (each + vector_bytes(setting.model))
    ring = 2 * (nodes - 1) / nodes
    return Network(
        whole_bytes=sent[False],
        compressed_bytes=sent[True],
        pays_below_gbit=8e-9 * ring * sent[False] / (update_seconds * 2 / 3),
    )
