"""What the settings of `jobs.train_dvae` and `jobs.train_vqvae` have in common."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

from jobs.configs.job import DatasetPath, Job
from jobs.picture_stream import LoadersConfig
from jobs.workers import WorkersConfig
from models.stage_one import StageOneConfig
from pipelines.data.crops import CropConfig
from pipelines.data.storage import Location
from pipelines.training.stage_one_training import StageOneCadence, StageOneTraining
from pipelines.training.watchdog import WatchdogConfig

# Whole pictures, as jobs.encode_pairs tiny has them.
WHOLE_PICTURES = CropConfig(scale_low=1.0, scale_high=1.0, flip=False)
TINY_CADENCE = StageOneCadence(log_every=25, checkpoint_every=200, images_every=400)


@dataclass(frozen=True, kw_only=True)
class TrainStageOneJob(Job, ABC):
    """Train stage one on filtered pictures."""

    output: Path

    filtered: DatasetPath = Location("runs/12b/filtered")
    """Filtered pairs, made by filter_pairs."""
    training: StageOneTraining
    cadence: StageOneCadence = field(default_factory=StageOneCadence)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    workers: WorkersConfig = field(default_factory=lambda: WorkersConfig(num_workers=64))
    loaders: LoadersConfig = field(default_factory=LoadersConfig)

    @property
    @abstractmethod
    def model(self) -> StageOneConfig: ...
