"""A rank in both trainings on pictures: trains under the watchdog, keeps what comes of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from pipelines.data.storage import Location
from pipelines.training.desk import Desk, ignore
from pipelines.training.picture_loader import PictureSource
from pipelines.training.stopping import StopRequest
from pipelines.training.watchdog import Watchdog, WatchdogConfig


class PictureStage(Protocol):
    """What both stages have."""

    @property
    def output(self) -> Path: ...
    @property
    def filtered(self) -> Path | Location: ...
    @property
    def config(self) -> Any: ...
    @property
    def training(self) -> Any: ...
    @property
    def cadence(self) -> Any: ...
    @property
    def watchdog(self) -> WatchdogConfig: ...


def picture_source(stage: PictureStage) -> PictureSource:
    """What makes the loaders of a stage's pictures."""
    return PictureSource(
        filtered=stage.filtered,
        crops=stage.training.crops,
        image_size=stage.config.image_size,
        batch_samples=stage.training.batch_samples,
        seed=stage.training.seed,
    )


class ModelDesk(Desk):
    """A desk that keeps a model at the end."""

    def keep(self, weights: dict[str, Tensor]) -> None:
        """The result and, last, the model file."""
        raise NotImplementedError


def run_picture_stage(
    stage: PictureStage,
    desk: ModelDesk | None,
    train: Callable[..., dict[str, Tensor] | None],
    *,
    rank: int,
    world_size: int,
) -> None:
    """`train` a stage on this rank, which has a desk if it is the first.

    If it is asked to stop (`StopRequest(stage.output)`), there is a checkpoint and no model.
    """
    with Watchdog(
        stage.output / ".heartbeats", stage.watchdog, rank=rank, world_size=world_size
    ) as watchdog:
        weights = train(
            stage.config,
            stage.training,
            cadence=stage.cadence,
            rank=rank,
            world_size=world_size,
            checkpoints=stage.output / "checkpoints",
            on_log=desk.log if desk else ignore,
            on_resume=desk.resume if desk else ignore,
            on_notice=desk.notice if desk else ignore,
            is_asked_to_stop=StopRequest(stage.output).is_asked,
            beat=watchdog.beat,
        )
        if desk and weights is None:
            desk.stop()
        elif desk and weights is not None:
            desk.keep(weights)
