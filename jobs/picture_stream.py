"""Pictures for a training, read, decoded and augmented by CPU actors beside it: Ray Data.

Every training worker streams its own part: the dataset's rows are the numbers of updates, and an
actor's loader makes the batch of a number. So a batch is a function of its number, here as
everywhere (pipelines.training.picture_loader), and a resumed training asks for those that are left.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pipelines.training.picture_loader import Arrays, Batch, prefetch

if TYPE_CHECKING:
    from ray.data import Dataset

UPDATES_A_TASK = 4
"""Batches that an actor makes at a call: as few as keep the calls' own cost small, since the
batches of the other actors wait for their turn."""
UPDATES_A_STREAM = 8192
"""After so many a new stream begins: the plan of a whole training would be millions of tasks."""


class Loader(Protocol):
    """What makes a worker's batches: a function of the number of the update."""

    def arrays(self, step: int) -> Arrays: ...


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

    def __init__(self, make_loader: Callable[[], Loader]) -> None:
        self.loader = make_loader()

    def __call__(self, updates: dict[str, np.ndarray]) -> Iterator[Arrays]:
        """A row each, as soon as it is made."""
        for step in updates["step"].tolist():
            arrays = self.loader.arrays(step)
            yield {"step": np.array([step])} | {name: a[None] for name, a in arrays.items()}


def batches_of(
    make_loader: Callable[[], Loader],
    unpack: Callable[[Arrays], Batch],
    loaders: LoadersConfig,
    *,
    batch_bytes: int,
) -> Callable[[int, int], AbstractContextManager[Iterator[Batch]]]:
    """What gives a worker its batches of the updates first … last - 1: actors, or a thread.

    `make_loader` travels to the actors; a batch of the worker takes about `batch_bytes`.
    """
    if loaders.per_worker:
        return partial(_stream, make_loader, unpack, loaders, batch_bytes)
    loader = make_loader()
    return partial(prefetch, lambda step: unpack(loader.arrays(step)))


@contextmanager
def _stream(
    make_loader: Callable[[], Loader],
    unpack: Callable[[Arrays], Batch],
    loaders: LoadersConfig,
    batch_bytes: int,
    first: int,
    last: int,
) -> Iterator[Iterator[Batch]]:
    def batches() -> Generator[Batch, None, None]:
        expected = first
        for start in range(first, last, UPDATES_A_STREAM):
            steps = range(start, min(start + UPDATES_A_STREAM, last))
            dataset = _dataset(make_loader, loaders, batch_bytes, steps)
            for row in dataset.iter_batches(batch_size=1, prefetch_batches=2):
                # The order is asked for below; a training on other pictures would not tell.
                if int(row["step"][0]) != expected:
                    raise RuntimeError(f"batch {expected} was expected, got {row['step'][0]}")
                expected += 1
                # The object store's memory is read-only, and torch wants to be able to write.
                yield unpack({name: np.array(a[0]) for name, a in row.items() if name != "step"})

    stream = batches()
    try:
        yield stream
    finally:
        stream.close()


def _dataset(
    make_loader: Callable[[], Loader], loaders: LoadersConfig, batch_bytes: int, steps: range
) -> "Dataset":
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    # A batch leaves the actor when it is made, not when many are.
    context.target_max_block_size = max(1, batch_bytes)
    rows = [{"step": step} for step in steps]
    tasks = -(-len(rows) // UPDATES_A_TASK)
    return ray.data.from_items(rows, override_num_blocks=tasks).map_batches(
        BatchReader,
        batch_size=UPDATES_A_TASK,
        fn_constructor_args=(make_loader,),
        compute=ray.data.ActorPoolStrategy(size=loaders.per_worker),
        num_cpus=1,
    )
