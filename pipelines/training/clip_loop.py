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
    on_notice: Callable[[int, str], None] = lambda step, text: None,
    is_asked_to_stop: Callable[[], bool] = lambda: False,
    beat: Callable[[str], None] = lambda doing: None,
) -> dict[str, Tensor] | None:
    """Train to the last step; gives the averaged weights, equal on every rank.

    None if any rank was asked to stop before: there is a checkpoint then. `beat` is told what comes
    next, `on_notice` words for a person. `keys` names the pairs of an update's batch,
    `stage_one` redraws pictures of it, if any are. `on_weights` takes the averaged weights every
    `validate_every` updates and at the end. Every rank calls these; the caller acts on rank 0.
    """
    trainer = ClipTrainer(
        config, training, device=device, rank=rank, world_size=world_size, stage_one=stage_one
    )
    settings = {"model": asdict(config), "training": asdict(training)}
    saved = Checkpoints(
        checkpoints, keep=cadence.keep_checkpoints, settings=settings, on_failure=on_notice
    )
    said = trainer.resume(saved)
    on_resume(trainer.step, said)
    pace, spoilers, unusable = Pace(trainer.step), Spoilers(keys, world_size), 0
    with saved, batches(trainer.step, training.steps) as stream:
        while trainer.step < training.steps:
            beat(f"the batch of update {trainer.step + 1}")
            batch = pace.take(stream)
            beat(f"update {trainer.step + 1}")
            unusable += batch.pictures.unusable
            update = trainer.update(batch, stop=is_asked_to_stop())
            spoilers.note(trainer.step, trainer.replica.skipped_in_a_row, update.per_pair)
            is_due = due(trainer.step, training.steps)
            if is_due(cadence.log_every):
                metrics = trainer.metrics(update, unusable)
                on_log(trainer.step, metrics | pace.rates(trainer.step, training.batch_samples))
            if is_due(cadence.checkpoint_every) or trainer.replica.stop_asked:
                beat("the checkpoint")
                trainer.save(saved)
            if trainer.replica.stop_asked and trainer.step < training.steps:
                return None
            if is_due(cadence.validate_every):
                beat("the retrieval")
                on_weights(trainer.step, trainer.replica.average.state_dict())
    beat("the model file")
    return trainer.replica.average.state_dict()
