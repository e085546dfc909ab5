"""The training loop of stage one: knows neither Ray nor MLflow, runs on one process or many."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from models.stage_one import StageOneConfig
from pipelines.training.picture_loader import PictureBatch
from pipelines.training.stage_one_trainer import StageOneTrainer
from pipelines.training.stage_one_training import StageOneCadence, StageOneTraining

SKIPS_IN_A_ROW = 10
NAMED_KEYS = 20

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
) -> dict[str, Tensor]:
    """Train to the last step; gives the averaged weights, equal on every rank.

    `keys` names the pictures of an update's batch, `shown` are pictures (B, 3, S, S) uint8 to look
    at. Every rank calls `on_log` and `on_resume` (the caller acts on rank 0), rank 0 alone
    `on_images`, with pictures by name and the uses of each code since the last time.
    """
    trainer = StageOneTrainer(config, training, device=device, rank=rank, world_size=world_size)
    said = trainer.resume(checkpoints)
    on_resume(trainer.step, said)
    clock, waited, counted, unusable = time.monotonic(), 0.0, trainer.step, 0
    spoilers: list[str] = []
    with batches(trainer.step, training.steps) as stream:
        while trainer.step < training.steps:
            waited -= time.monotonic()
            batch = next(stream)
            waited += time.monotonic()
            unusable += batch.unusable
            due = _due(trainer.step + 1, training.steps)
            loss = trainer.update(batch.pixels, report=due(cadence.log_every))
            if not trainer.skipped_in_a_row:
                spoilers.clear()
            elif not torch.isfinite(loss.per_picture).all():
                spoilers += _spoilers(loss.per_picture, keys(trainer.step - 1))
            if trainer.skipped_in_a_row == SKIPS_IN_A_ROW:
                raise RuntimeError(_stopped(trainer, spoilers, keys(trainer.step - 1)))
            if due(cadence.log_every):
                elapsed = time.monotonic() - clock
                metrics = trainer.metrics(loss, {"unusable_pictures": unusable})
                pictures = (trainer.step - counted) * training.batch_samples
                rates = {"images_per_second": pictures / elapsed, "data_wait": waited / elapsed}
                on_log(trainer.step, metrics | rates)
                clock, waited, counted = time.monotonic(), 0.0, trainer.step
            if due(cadence.checkpoint_every):
                trainer.save(checkpoints, cadence.keep_checkpoints)
            if due(cadence.images_every) and rank == 0:
                on_images(trainer.step, trainer.preview(shown), trainer.take_usage())
    return trainer.replica.average.state_dict()


def _due(step: int, last: int) -> Callable[[int], bool]:
    return lambda every: step % every == 0 or step == last


def _spoilers(per_picture: Tensor, keys: list[str]) -> list[str]:
    """The keys of the pictures whose own loss is not finite."""
    spoiled = (~torch.isfinite(per_picture)).tolist()
    return [key for key, bad in zip(keys, spoiled, strict=True) if bad]


def _stopped(trainer: StageOneTrainer, spoilers: list[str], batch: list[str]) -> str:
    """What is said of a training that cannot go on; every rank comes here at the same update."""
    everyone: list[tuple[list[str], list[str]]] = [(spoilers, batch)]
    if trainer.world_size > 1:
        everyone *= trainer.world_size
        dist.all_gather_object(everyone, (spoilers, batch))
    named = list(dict.fromkeys(key for found, _ in everyone for key in found))
    what = "pictures whose loss was not finite"
    if not named:
        named = [key for _, last in everyone for key in last]
        what = "no picture stands out; the last batch's"
    more = f" and {len(named) - NAMED_KEYS} more" if len(named) > NAMED_KEYS else ""
    return (
        f"{SKIPS_IN_A_ROW} updates in a row up to {trainer.step} had no finite loss or gradient; "
        f"{what}: {', '.join(named[:NAMED_KEYS])}{more}"
    )
