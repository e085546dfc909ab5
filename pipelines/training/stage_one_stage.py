"""Training stage one from a filtered dataset to a model file: what a rank does, and what rank 0."""

from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.stage_one import StageOneConfig
from pipelines.data.stage import Manifest
from pipelines.data.storage import Location
from pipelines.training.codebook_picture import codebook_picture
from pipelines.training.desk import ignore
from pipelines.training.picture_loader import PictureSource
from pipelines.training.picture_stage import ModelDesk, picture_source, run_picture_stage
from pipelines.training.stage_one_loop import Batches, train_stage_one
from pipelines.training.stage_one_training import StageOneCadence, StageOneTraining
from pipelines.training.watchdog import WatchdogConfig
from pipelines.training.weights import save_model, stage_one_kind

SHOWN_PICTURES = 16


@dataclass(frozen=True, kw_only=True)
class StageOneStage:
    """All that a worker needs to know; travels to it."""

    output: Path
    filtered: Path | Location
    config: StageOneConfig
    training: StageOneTraining
    cadence: StageOneCadence
    tracking_uri: str
    """Empty for none."""
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)

    @property
    def model_file(self) -> Path:
        return model_file(self.output, self.config)

    @property
    def batch_bytes(self) -> int:
        """Of an update's pictures, over all ranks."""
        return 3 * self.config.image_size**2 * self.training.batch_samples

    @property
    def source(self) -> PictureSource:
        """What makes the batches."""
        return picture_source(self)


def model_file(output: Path, config: StageOneConfig) -> Path:
    """Where a training leaves its model: OUTPUT/dvae.safetensors or OUTPUT/vqvae.safetensors."""
    return output / f"{stage_one_kind(config)}.safetensors"


def run_stage_one(
    stage: StageOneStage,
    *,
    batches: Batches,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Train on this rank; rank 0 writes metrics, pictures, `result.json` and the model file.

    If it is asked to stop (`StopRequest(stage.output)`), it makes a checkpoint and no model file.
    """
    desk = _Desk(stage) if rank == 0 else None
    train = partial(
        train_stage_one,
        batches=batches,
        keys=stage.source.loader(rank, world_size).keys,
        device=device,
        shown=stage.source.loader(0, 1).batch(0).pixels[:SHOWN_PICTURES],
        on_images=desk.show if desk else ignore,
    )
    run_picture_stage(stage, desk, train, rank=rank, world_size=world_size)


class _Desk(ModelDesk):
    """What rank 0 does with what the loop hands out."""

    def __init__(self, stage: StageOneStage) -> None:
        super().__init__(stage.output, stage.tracking_uri)
        self.stage = stage

    def log(self, step: int, metrics: dict[str, float]) -> None:
        collapsed_before = self.metrics.get("codebook_collapsed")
        super().log(step, metrics)
        if metrics["codebook_collapsed"] and not collapsed_before:
            self.notice(
                step,
                f"THE CODEBOOK HAS COLLAPSED: {metrics['codes_used']:.0f} of "
                f"{self.stage.config.vocab_size} codes are in use after update {step}. Pictures "
                "will lose their detail. For a short dVAE training, begin with the full KL weight "
                "(--training.schedule.beta-start); see docs/stage-one.md",
            )

    def show(self, step: int, pictures: dict[str, np.ndarray], usage: np.ndarray) -> None:
        # One column a picture; rows of originals, hard and relaxed reconstructions.
        rows = [np.concatenate(list(row), axis=1) for row in pictures.values()]
        self.tracker.log_image("reconstructions", np.concatenate(rows, axis=0), step)
        self.tracker.log_image("codebook", codebook_picture(usage, f"update {step}"), step)

    def keep(self, weights: dict[str, Tensor]) -> None:
        stage = self.stage
        self.keep_result(stage.training.steps)
        manifest = Manifest.load(stage.filtered, stage="filter_pairs")
        save_model(
            stage.model_file,
            kind=stage_one_kind(stage.config),
            config=stage.config,
            state=weights,
            metadata={"filtered_digest": manifest.digest, "training": asdict(stage.training)},
        )
