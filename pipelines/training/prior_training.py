"""How the prior is trained: what a result depends on, and what it does not."""

from dataclasses import asdict, dataclass, field
from functools import reduce
from operator import getitem
from typing import Any, Literal

import torch

from models.averaging import AveragingConfig
from models.resblock_scaling import ResblockScalingConfig
from models.schedules import PlateauConfig
from pipelines.training.adamw_rule import Moments
from pipelines.training.spikes import SpikeConfig

Precision = Literal["fp32", "bf16", "fp16"]

Recompute = Literal["none", "selective", "full"]
"""What of a resblock's activations is made again in the backward pass: nothing; all but what its
large products made (LayerNorm, attention, GELU); all but its input (the paper)."""

WIRE = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class PriorOptimizerConfig:
    """The defaults are the paper's (appendix B.2)."""

    peak_lr: float = 4.5e-4
    """Step size after the warm-up."""
    warmup_steps: int = 5000
    decay: Literal["plateau", "cosine"] = "plateau"
    """Halve when the training loss stops falling (the paper), or a half cosine to peak_lr / 32."""
    plateau: PlateauConfig = field(default_factory=PlateauConfig)
    beta1: float = 0.9
    beta2: float = 0.96
    epsilon: float = 1e-8
    weight_decay: float = 4.5e-2
    """On the weights of Linear layers only; the paper does not say on which."""
    clip_norm: float = 4.0
    """Largest global norm of the gradients; 0: any."""
    moments: Moments = "paper"
    """How AdamW keeps the moments of the resblocks' matrices: in fp32, in bf16, or in the paper's
    formats of 6 exponent bits, with the variance clipped to 5. All else has them in fp32."""
    master: Literal["fp32", "split"] = "fp32"
    """How the resblocks' matrices keep their fp32 weights: as such, or as a bf16 weight, which the
    model uses as it is, and the 16 bits that it lacks. The paper does not say."""
    step: Literal["after", "in_backward"] = "after"
    """Update after the backward pass (the paper), or each resblock as soon as it has its gradients,
    so that all gradients never exist at once."""

    def __post_init__(self) -> None:
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.epsilon > 0):
            raise ValueError(
                "beta1 and beta2 must be in [0, 1) and epsilon above 0, "
                f"got {self.beta1}, {self.beta2}, {self.epsilon}"
            )
        if self.clip_norm < 0:
            raise ValueError(f"clip_norm must be above 0, or 0 for none, got {self.clip_norm}")
        if self.step == "in_backward" and self.clip_norm:
            raise ValueError(
                "optimizer.step in_backward excludes optimizer.clip_norm, because the global norm "
                f"is known only after the last update: clip_norm must be 0, got {self.clip_norm}; "
                "or set step to after"
            )


@dataclass(frozen=True, kw_only=True)
class PowerSGDConfig:
    """Compression between groups of workers. Off, because fast networks hide whole gradients."""

    enabled: bool = False
    share: float = 0.28
    """Numbers sent of a matrix's: an (m, n) shard has the largest rank r with r (m + n) at most
    share · m n. The paper's 12B sends 5 · 896 / (4 · 3968) = 0.28, its 5.6B 0.30, its 2.8B 0.33
    (rank 896, 640, 512 of a d × 4d matrix; table 2 counts half, for its 16 bits)."""
    wire: Literal["fp32", "bf16"] = "bf16"
    """Of the thin matrices on the network. The paper's is a 16-bit format of its own."""

    def __post_init__(self) -> None:
        # A square matrix has its full rank at 2, where nothing is saved and nothing lost.
        if not 0 < self.share <= 2:
            raise ValueError(f"power_sgd.share must be in (0, 2], got {self.share}")

    def rank(self, rows: int, columns: int) -> int:
        """Of a shard's compressed gradient; 0 if it is so small that it is sent whole."""
        rank = int(self.share * rows * columns / (rows + columns))
        return min(rank, rows, columns)

    def sent_bytes(self, rows: int, columns: int) -> int:
        """That a worker hands to the network for a shard in an update."""
        rank = self.rank(rows, columns)
        if not rank:
            return 4 * rows * columns
        return rank * (rows + columns) * WIRE[self.wire].itemsize


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """Where weights, gradients and the optimizer's state lie. The defaults are the paper's."""

    group_size: int = 8
    """Workers that hold the weights once between them: those of a machine. Further workers are
    replicas; fewer workers are one group. 1 sends gradients and nothing else, if every
    worker has room for the whole model."""
    keep_gathered: bool = False
    """Keep a resblock's gathered weights from the forward to the backward pass: a third fewer
    messages, for all of the weights in every worker's memory. The paper drops them at once."""
    power_sgd: PowerSGDConfig = field(default_factory=PowerSGDConfig)

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")

    def shards(self, world_size: int) -> int:
        """Workers that hold the weights once between them.

        Raises ValueError if the workers are not a whole number of groups.
        """
        shards = min(self.group_size, world_size)
        if world_size % shards:
            raise ValueError(
                f"the number of workers must divide by sharding.group_size, got {world_size} "
                f"workers and groups of {shards}: change either"
            )
        return shards


@dataclass(frozen=True, kw_only=True)
class PriorTraining:
    """How the prior is trained. The defaults are the paper's (appendix B.2)."""

    steps: int = 430_000
    """Updates."""
    batch_samples: int = 1024
    """Pictures an update, over all workers; must divide by workers · micro_batches."""
    micro_batches: int = 1
    """Parts in which a worker runs its share of the batch."""
    precision: Precision = "fp16"
    """Of the resblocks' branches; the residual stream, logits and embeddings are always fp32."""
    resblock_scaling: Literal["fp16", "always", "never"] = "fp16"
    """When gradients are scaled per resblock: in fp16 only, in every precision, or never."""
    scaling: ResblockScalingConfig = field(default_factory=ResblockScalingConfig)
    optimizer: PriorOptimizerConfig = field(default_factory=PriorOptimizerConfig)
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    bpe_dropout: float = 0.1
    """Share of BPE merges left out at random (paper, section 2.2)."""
    caption_dropout: float = 0.0
    """Share of samples whose caption is left empty, for sampling with a cond_scale; not the
    paper's."""
    recompute: Recompute = "full"
    """Backwards: "selective": LayerNorm, attention, GELU; "full": whole resblocks, as the paper."""
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_samples < 1 or self.micro_batches < 1:
            raise ValueError(
                "steps, batch_samples and micro_batches must be at least 1, "
                f"got {self.steps}, {self.batch_samples}, {self.micro_batches}"
            )
        if not 0 <= self.bpe_dropout < 1:
            raise ValueError(f"bpe_dropout must be in [0, 1), got {self.bpe_dropout}")
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout must be in [0, 1), got {self.caption_dropout}")
        if self.optimizer.step == "in_backward" and self.micro_batches > 1:
            raise ValueError(
                "optimizer.step in_backward excludes micro_batches, whose gradients would have to "
                f"be kept: micro_batches must be 1, got {self.micro_batches}; lower batch_samples, "
                "or set optimizer.step to after"
            )
        if self.optimizer.master == "split" and self.precision != "bf16":
            raise ValueError(
                "optimizer.master split keeps bf16 weights: precision must be bf16, "
                f"got {self.precision}; or set optimizer.master to fp32"
            )

    def check_workers(self, num_workers: int) -> None:
        """Refuse what only one worker can do, and a batch that cannot be shared out."""
        if self.batch_samples % (num_workers * self.micro_batches):
            raise ValueError(
                "batch_samples must divide by workers · micro_batches, got "
                f"{self.batch_samples}, {num_workers} workers and {self.micro_batches} "
                f"micro_batches: the next that does is "
                f"{-(-self.batch_samples // (n := num_workers * self.micro_batches)) * n}"
            )
        alone = {
            "optimizer.master split": self.optimizer.master == "split",
            "optimizer.step in_backward": self.optimizer.step == "in_backward",
            "averaging.keep_on host": self.averaging.keep_on == "host",
        }
        for name, chosen in alone.items():
            if chosen and num_workers > 1:
                raise ValueError(
                    f"{name} is for a training of one worker, got {num_workers}: "
                    "workers share the state out, so leave it at its default"
                )

    def settings(self) -> dict[str, Any]:
        """All that a result depends on: what a checkpoint must agree with."""
        settings = asdict(self)
        for name in self.layout():
            *parts, last = name.split(".")
            del reduce(getitem, parts, settings)[last]
        return settings

    def layout(self) -> dict[str, Any]:
        """How the work is spread over workers and time, by field.

        It changes no result but by rounding, and a training may go on with another one.
        """
        layout = {
            "micro_batches": self.micro_batches,
            "recompute": self.recompute,
            "sharding.keep_gathered": self.sharding.keep_gathered,
        }
        if self.sharding.power_sgd.enabled:  # it compresses shards: their shapes count
            return layout
        return layout | {"sharding.group_size": self.sharding.group_size}

    @property
    def scales_resblocks(self) -> bool:
        return self.resblock_scaling == "always" or (
            self.resblock_scaling == "fp16" and self.precision == "fp16"
        )


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """How often things are written, in updates; changing it does not change the result."""

    log_every: int = 10
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    sample_every: int = 5000
    """Average weights are gathered on rank 0 and sampled from."""
    validate_every: int = 1000
    """Losses on held-out rows, with the weights as they are and averaged."""
    validation_samples: int = 1024
    """Rows of the validation split that are looked at; a smaller split whole."""
    ask_every: int = 20
    """Whether a machine is about to go away: all ranks wait for the answer together."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"cadence.{name} must be at least 1, got {value}")
