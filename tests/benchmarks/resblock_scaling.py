"""What gradient scaling per resblock costs a whole update, on a CPU and without a compiler."""

import math
from dataclasses import replace

import torch

from models.prior import PriorConfig
from pipelines.training.prior_trainer import PriorTrainer
from pipelines.training.prior_training import Precision, PriorOptimizerConfig, PriorTraining
from pipelines.training.token_loader import TokenBatch
from tests.benchmarks.measure import Effort, Row, compare_speed
from tests.benchmarks.prior import LONG, SHORT, lengths, tokens

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


def rows(effort: Effort) -> list[Row]:
    """At the paper's lengths; with less than the usual effort, at short ones."""
    config = LONG if effort.rows >= Effort().rows else SHORT
    plain = PriorTraining(
        steps=1_000_000,
        batch_samples=1,
        recompute="none",
        resblock_scaling="never",
        optimizer=PriorOptimizerConfig(moments="fp32"),
    )
    return [
        overhead_row(config, replace(plain, precision=precision), effort)
        for precision in PRECISIONS
    ]


def overhead_row(config: PriorConfig, plain: PriorTraining, effort: Effort) -> Row:
    """Updates with scaling against updates without: the same model, the same picture."""
    device = torch.device("cpu")
    scaled = PriorTrainer(config, replace(plain, resblock_scaling="always"), device)
    unscaled = PriorTrainer(config, plain, device)
    batch = TokenBatch(*tokens(config))
    for trainer in (scaled, unscaled):
        assert math.isfinite(trainer.update(batch)["grad_norm"])
    assert len(scaled.scales.values) == config.n_resblocks
    assert (scaled.scales.values > plain.scaling.initial).all()  # they moved
    return compare_speed(
        f"resblock-scaling-overhead-{plain.precision}",
        peer="the same without scaling",
        precision=plain.precision,
        work=config.stream_len,
        what="tokens",
        ours=lambda: scaled.update(batch),
        theirs=lambda: unscaled.update(batch),
        repeats=effort.repeats,
        packages=("torch",),
        note=f"{config.n_resblocks} resblocks of {config.d_model}, {lengths(config)}, one picture, "
        "eager, checks and norms of all gradients in both",
    )
