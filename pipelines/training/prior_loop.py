"""The training loop of the prior: without Ray or MLflow, on one process or many."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.prior import Prior, PriorConfig
from pipelines.training.block_history import BlockRecord
from pipelines.training.prior_trainer import PriorTrainer, PriorTraining
from pipelines.training.token_loader import TokenLoader


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """How often things are written, in updates; changing it does not change the result."""

    log_every: int = 10
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    sample_every: int = 5000
    """Average weights are gathered on rank 0 and sampled from."""


def train_prior(
    model: PriorConfig,
    training: PriorTraining,
    *,
    cadence: Cadence,
    loader: TokenLoader,
    device: torch.device,
    checkpoints: Path,
    on_log: Callable[[int, dict[str, float]], None],
    on_resume: Callable[[int, list[str]], None],
    on_weights: Callable[[int, dict[str, Tensor]], None],
    on_blocks: Callable[[int, BlockRecord], None] = lambda step, record: None,
) -> None:
    """Train to the last step; the effects are the caller's.

    `on_log` takes metrics and `on_blocks` the resblocks' record, every `log_every` steps,
    `on_weights` the averaged weights, every `sample_every` steps and at the end; empty on all ranks
    but 0. Every rank calls them; the caller acts on rank 0.
    """
    trainer = PriorTrainer(model, training, device)
    said = trainer.resume(checkpoints)
    on_resume(trainer.step, said)
    clock = time.monotonic()
    waited = 0.0
    while trainer.step < training.steps:
        asked = time.monotonic()
        batch = loader.batch(trainer.step)
        waited += time.monotonic() - asked
        metrics = trainer.update(batch)
        step = trainer.step
        last = step == training.steps
        if step % cadence.log_every == 0 or last:
            elapsed = time.monotonic() - clock
            span = (step - 1) % cadence.log_every + 1
            rates = {
                "images_per_second": span * training.batch_samples / elapsed,
                "data_wait": waited / elapsed,
            }
            record = trainer.block_record()
            on_log(step, {**metrics, **rates, **_scale_metrics(trainer, record)})
            on_blocks(step, record)
            clock, waited = time.monotonic(), 0.0
        if step % cadence.checkpoint_every == 0 or last:
            trainer.save(checkpoints, cadence.keep_checkpoints)
        if step % cadence.sample_every == 0 and not last:
            on_weights(step, trainer.averaged_weights())
    on_weights(trainer.step, trainer.averaged_weights())


def load_weights(model: PriorConfig, weights: dict[str, Tensor]) -> Prior:
    """A whole prior in eval mode from gathered weights."""
    with torch.device("meta"):
        prior = Prior(model)
    prior.load_state_dict(weights, strict=True, assign=True)
    return prior.eval()


def _scale_metrics(trainer: PriorTrainer, record: BlockRecord) -> dict[str, float]:
    """log2 of the resblocks' gradient scales, if they are in use."""
    if not trainer.training.scales_resblocks:
        return {}
    return {
        "gradient_scale_log2.lowest": float(record.scales.min()),
        "gradient_scale_log2.mean": float(record.scales.mean()),
        "gradient_scale_log2.highest": float(record.scales.max()),
    }
