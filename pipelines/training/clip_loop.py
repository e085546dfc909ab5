"""The training loop of the contrastive model: knows neither Ray nor MLflow."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from models.clip import ClipConfig
from models.stage_one import StageOne
from pipelines.training.checkpoint import Checkpoints
from pipelines.training.clip_trainer import ClipTrainer
from pipelines.training.clip_training import ClipCadence, ClipTraining
from pipelines.training.pace import Pace, due
from pipelines.training.pair_loader import PairBatch
from pipelines.training.spoilers import Spoilers

Batches = Callable[[int, int], AbstractContextManager[Iterator[PairBatch]]]
"""This rank's batches of the updates from the first number up to, without, the second."""


def train_clip(
    config: ClipConfig,
    training: ClipTraining,
    *,
    cadence: ClipCadence,
    batches: Batches,
    keys: Callable[[int], list[str]],
    device: torch.device,
    rank: int,
    world_size: int,
    stage_one: StageOne | None,
    checkpoints: Path,
    on_log: Callable[[int, dict[str, float]], None],
    on_resume: Callable[[int, list[str]], None],
    on_weights: Callable[[int, dict[str, Tensor]], None],
) -> dict[str, Tensor]:
    """Train to the last step; gives the averaged weights, equal on every rank.

    `keys` names the pairs of an update's batch, `stage_one` redraws pictures of it, if any are.
    `on_weights` takes the averaged weights every `validate_every` updates and at the end. Every
    rank calls the three; the caller acts on rank 0.
    """
    trainer = ClipTrainer(
        config, training, device=device, rank=rank, world_size=world_size, stage_one=stage_one
    )
    settings = {"model": asdict(config), "training": asdict(training)}
    saved = Checkpoints(checkpoints, keep=cadence.keep_checkpoints, settings=settings)
    said = trainer.resume(saved)
    on_resume(trainer.step, said)
    pace, spoilers, unusable = Pace(trainer.step), Spoilers(keys, world_size), 0
    with saved, batches(trainer.step, training.steps) as stream:
        while trainer.step < training.steps:
            batch = pace.take(stream)
            unusable += batch.pictures.unusable
            update = trainer.update(batch)
            spoilers.note(trainer.step, trainer.replica.skipped_in_a_row, update.per_pair)
            is_due = due(trainer.step, training.steps)
            if is_due(cadence.log_every):
                metrics = trainer.metrics(update, unusable)
                on_log(trainer.step, metrics | pace.rates(trainer.step, training.batch_samples))
            if is_due(cadence.checkpoint_every):
                trainer.save(saved)
            if is_due(cadence.validate_every):
                on_weights(trainer.step, trainer.replica.average.state_dict())
    return trainer.replica.average.state_dict()
