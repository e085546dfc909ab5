"""The plan's memory against what torch allocates in a real update on a CPU."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from models.averaging import AveragingConfig
from models.prior import PriorConfig, count_parameters
from pipelines.training.plan_memory import Setting, parameter_counts, peak_memory
from pipelines.training.prior_trainer import PriorTrainer
from pipelines.training.prior_training import (
    PriorOptimizerConfig,
    PriorTraining,
    Recompute,
    ShardingConfig,
)
from pipelines.training.token_loader import TokenBatch
from tests.fixtures.allocation import peak_bytes
from tests.fixtures.ranks import on_ranks

# Activations weigh the most in one, weights in the other.
BROAD = PriorConfig(
    n_layers=4, n_heads=4, d_model=128, text_len=32, text_vocab_size=256, grid=12,
    image_vocab_size=128, conv_kernel=5,
)  # fmt: skip
HEAVY = replace(BROAD, n_layers=3, d_model=384, grid=8)
CONFIGS = {"broad": (BROAD, 16), "heavy": (HEAVY, 4)}


def full_captions(model: PriorConfig, samples: int) -> TokenBatch:
    """No padding: the text logits are as many as there can be."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(2, model.text_vocab_size, (samples, model.text_len), generator=generator)
    shape = samples, model.image_len
    return TokenBatch(text, torch.randint(0, model.image_vocab_size, shape, generator=generator))


def measured(model: PriorConfig, training: PriorTraining, workers: int = 1) -> int:
    """The most allocated in two updates, in the second of which the optimizer has its state."""
    batch = full_captions(model, training.batch_samples // workers)

    def train() -> None:
        trainer = PriorTrainer(model, training, torch.device("cpu"))
        for _ in range(2):
            trainer.update(batch)

    return peak_bytes(train)


def training_of(samples: int, **overrides: Any) -> PriorTraining:
    values: dict[str, Any] = {
        "batch_samples": samples,
        "precision": "fp32",
        "optimizer": PriorOptimizerConfig(moments="fp32"),
    }
    return PriorTraining(**(values | overrides))


COMPACT = PriorOptimizerConfig(moments="paper", master="split", step="in_backward", clip_norm=0.0)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_plan_is_within_a_tenth_of_a_real_update(
    config: str, precision: Any, recompute: Recompute
) -> None:
    model, samples = CONFIGS[config]
    how = training_of(samples, precision=precision, recompute=recompute)
    planned = peak_memory(Setting(model=model, training=how, workers=1, device="cpu"))
    real = measured(model, how)
    assert sum(planned.values()) == pytest.approx(real, rel=0.1), planned


@pytest.mark.parametrize(
    "how",
    [
        {"micro_batches": 2},
        {"optimizer": PriorOptimizerConfig(moments="bf16"), "resblock_scaling": "always"},
        {
            "optimizer": COMPACT,
            "precision": "bf16",
            "recompute": "selective",
            "averaging": AveragingConfig(keep_on="host"),
        },
    ],
    ids=["micro-batches", "bf16 moments", "compact"],
)
@pytest.mark.parametrize("config", CONFIGS)
def test_the_plan_knows_the_optimizer_s_options(config: str, how: dict[str, Any]) -> None:
    model, samples = CONFIGS[config]
    training = training_of(samples, **how)
    planned = peak_memory(Setting(model=model, training=training, workers=1, device="cpu"))
    real = measured(model, training)
    if training.averaging.keep_on == "host":
        real -= 4 * count_parameters(model)  # the host is the device here
    assert sum(planned.values()) == pytest.approx(real, rel=0.1), planned


SHARDED: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "kept gathered": {"sharding": ShardingConfig(keep_gathered=True), "recompute": "none"},
    "micro-batches": {"precision": "bf16", "micro_batches": 2},
    "replicas": {"sharding": ShardingConfig(group_size=1)},
    "replicas bf16": {"sharding": ShardingConfig(group_size=1), "precision": "bf16"},
}


def _measured_sharded() -> dict[str, int]:
    samples = CONFIGS["heavy"][1]
    return {
        name: measured(HEAVY, training_of(samples, **how), dist.get_world_size())
        for name, how in SHARDED.items()
    }


def test_the_plan_knows_what_is_gathered_and_sharded(tmp_path: Path) -> None:
    real = on_ranks(_measured_sharded, 2, tmp_path)
    for name, how in SHARDED.items():
        training = training_of(CONFIGS["heavy"][1], **how)
        planned = peak_memory(Setting(model=HEAVY, training=training, workers=2, device="cpu"))
        # When gloo's threads give a buffer back is chance: 0.87 to 1.14 were seen.
        assert sum(planned.values()) == pytest.approx(real[name], rel=0.25), (name, planned)


def test_parameters_are_counted_as_the_model_has_them() -> None:
    for model in (BROAD, HEAVY, PriorConfig()):
        assert sum(parameter_counts(model)) == count_parameters(model)
