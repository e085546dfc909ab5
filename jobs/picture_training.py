"""Training on the pictures of filtered pairs: what stage one and the reranker do on the workers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from jobs import workers
from jobs.picture_stream import Loader, LoadersConfig, batches_of
from jobs.workers import WorkersConfig
from pipelines.training.picture_loader import Arrays


class Source(Protocol):
    """What makes a loader; all of a stage that travels on to the actors that load."""

    def loader(self, rank: int, world_size: int) -> Loader: ...


class PictureStage(Protocol):
    """What a worker of such a training needs to know."""

    @property
    def output(self) -> Path: ...

    @property
    def batch_bytes(self) -> int: ...

    @property
    def source(self) -> Source: ...


def train_on_pictures(
    run: Callable[..., None],
    stage: PictureStage,
    unpack: Callable[[Arrays], Any],
    workers_config: WorkersConfig,
    loaders: LoadersConfig,
) -> None:
    """Run `run(stage, batches=…, device=…, rank=…, world_size=…)` on every worker.

    `unpack` makes a batch of what the stage's loader gives.
    """
    workers.train_on_workers(
        _work,
        {"run": run, "stage": stage, "unpack": unpack, "loaders": loaders},
        workers_config,
        stage.output,
        loaders_per_worker=loaders.per_worker,
    )


def _work(argument: dict[str, Any]) -> None:
    worker = workers.this_worker()
    stage: PictureStage = argument["stage"]
    batches = batches_of(
        partial(stage.source.loader, worker.rank, worker.world_size),
        argument["unpack"],
        argument["loaders"],
        batch_bytes=stage.batch_bytes // worker.world_size,
    )
    argument["run"](
        stage,
        batches=batches,
        device=worker.device,
        rank=worker.rank,
        world_size=worker.world_size,
    )
