"""The training loop of stage one: knows neither Ray nor MLflow, runs on one process or many."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.stage_one import StageOneConfig
from pipelines.training.checkpoint import Checkpoints
from pipelines.training.pace import Pace, due
from pipelines.training.picture_loader import PictureBatch
from pipelines.training.spoilers import Spoilers
from pipelines.training.stage_one_trainer import StageOneTrainer
from pipelines.training.stage_one_training import StageOneCadence, StageOneTraining

Batches = Callable[[int, int], AbstractContextManager[Iterator[PictureBatch]]]
"""This rank's batches of the updates from the first number up to, without, the second."""


def train_stage_one(
    config: StageOneConfig,
    training: StageOneTraining,
    *,
    cadence: StageOneCadence,
    batches: Batches,
    keys: Callable[[int], list[str]],
    shown: Tensor,
    device: torch.device,
    rank: int,
    world_size: int,
    checkpoints: Path,
    on_log: Callable[[int, dict[str, float]], None],
    on_resume: Callable[[int, list[str]], None],
    on_images: Callable[[int, dict[str, np.ndarray], np.ndarray], None],
    on_notice: Callable[[int, str], None] = lambda step, text: None,
    is_asked_to_stop: Callable[[], bool] = lambda: False,
    beat: Callable[[str], None] = lambda doing: None,
) -> dict[str, Tensor] | None:
    """Train to the last step; gives the averaged weights, equal on every rank.

    None if any rank was asked to stop before: there is a checkpoint then. `beat` is told what comes
    next, `on_notice` words for a person. `keys` names the pictures of an update's
    batch, `shown` are pictures (B, 3, S, S) uint8 to look at. Every rank calls these (the caller
    acts on rank 0), rank 0 alone `on_images`, with pictures by name and the uses of each code since
    the last time.
    """
    trainer = StageOneTrainer(config, training, device=device, rank=rank, world_size=world_size)
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
            unusable += batch.unusable
            is_due = due(trainer.step + 1, training.steps)
            loss = trainer.update(
                batch.pixels, report=is_due(cadence.log_every), stop=is_asked_to_stop()
            )
            spoilers.note(trainer.step, trainer.skipped_in_a_row, loss.per_picture)
            if is_due(cadence.log_every):
                metrics = trainer.metrics(loss, {"unusable_pictures": unusable})
                on_log(trainer.step, metrics | pace.rates(trainer.step, training.batch_samples))
            if is_due(cadence.checkpoint_every) or trainer.stop_asked:
                beat("the checkpoint")
                trainer.save(saved)
            if trainer.stop_asked and trainer.step < training.steps:
                return None
            if is_due(cadence.images_every):
                beat("the pictures")
                if rank == 0:
                    on_images(trainer.step, trainer.preview(shown), trainer.take_usage())
    beat("the model file")
    return trainer.replica.average.state_dict()
