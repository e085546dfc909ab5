"""Pictures for a training, read, decoded and augmented by CPU actors beside it: Ray Data.

Every training worker streams its own part: the dataset's rows are the numbers of updates, and an
actor's loader makes the batch of a number. So a batch is a function of its number, here as
everywhere (pipelines.training.picture_loader), and a resumed training asks for those that are left.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jobs.workers import Worker
from pipelines.training.picture_loader import PictureBatch
from pipelines.training.stage_one_stage import StageOneStage

if TYPE_CHECKING:
    from ray.data import Dataset

UPDATES_A_TASK = 4
"""Batches that an actor makes at a call: as few as keep the calls' own cost small, since the
batches of the other actors wait for their turn."""
UPDATES_A_STREAM = 8192
"""After so many a new stream begins: the plan of a whole training would be millions of tasks."""


@dataclass(frozen=True, kw_only=True)
class LoadersConfig:
    """The processes that make a training's batches."""

    per_worker: int = 2
    """Actors for each training worker, one CPU each (`make bench`, jpeg-crop, says how fast one
    is); 0 makes the batches in a thread of the worker, which suits the smallest models."""

    def __post_init__(self) -> None:
        if self.per_worker < 0:
            raise ValueError(f"per_worker must be at least 0, got {self.per_worker}")


class BatchReader:
    """Makes the batches of the updates it is asked for: one actor of the stream."""

    def __init__(self, stage: StageOneStage, rank: int, world_size: int) -> None:
        self.loader = stage.loader(rank, world_size)

    def __call__(self, updates: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """A row each, as soon as it is made."""
        for step in updates["step"].tolist():
            squares, unusable = self.loader.squares(step)
            yield {
                "step": np.array([step]),
                "squares": squares[None],
                "unusable": np.array([unusable]),
            }


@contextmanager
def stream_pictures(
    stage: StageOneStage, worker: Worker, loaders: LoadersConfig, first: int, last: int
) -> Iterator[Iterator[PictureBatch]]:
    """The worker's batches of the updates first, first + 1, … last - 1."""

    def batches() -> Generator[PictureBatch, None, None]:
        expected = first
        for start in range(first, last, UPDATES_A_STREAM):
            steps = range(start, min(start + UPDATES_A_STREAM, last))
            dataset = _dataset(stage, worker, loaders, steps)
            for row in dataset.iter_batches(batch_size=1, prefetch_batches=2):
                # The order is asked for below; a training on other pictures would not tell.
                if int(row["step"][0]) != expected:
                    raise RuntimeError(f"batch {expected} was expected, got {row['step'][0]}")
                expected += 1
                yield _batch(row)

    stream = batches()
    try:
        yield stream
    finally:
        stream.close()


def _dataset(
    stage: StageOneStage, worker: Worker, loaders: LoadersConfig, steps: range
) -> "Dataset":
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    batch_bytes = 3 * stage.config.image_size**2 * stage.training.batch_samples
    # A batch leaves the actor when it is made, not when many are.
    context.target_max_block_size = max(1, batch_bytes // worker.world_size)
    rows = [{"step": step} for step in steps]
    tasks = -(-len(rows) // UPDATES_A_TASK)
    return ray.data.from_items(rows, override_num_blocks=tasks).map_batches(
        BatchReader,
        batch_size=UPDATES_A_TASK,
        fn_constructor_args=(stage, worker.rank, worker.world_size),
        compute=ray.data.ActorPoolStrategy(size=loaders.per_worker),
        num_cpus=1,
    )


def _batch(row: dict[str, Any]) -> PictureBatch:
    # The object store's memory is read-only, and torch wants to be able to write.
    squares = torch.from_numpy(np.array(row["squares"][0]))
    return PictureBatch(squares.permute(0, 3, 1, 2), int(row["unusable"][0]))
