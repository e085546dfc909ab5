"""Settings of `jobs.train_dvae`."""

from dataclasses import dataclass, field
from pathlib import Path

from jobs.configs.stage_one import TINY_CADENCE, WHOLE_PICTURES, TrainStageOneJob
from jobs.picture_stream import LoadersConfig
from jobs.workers import WorkersConfig
from models.averaging import AveragingConfig
from models.dvae import DVAEConfig
from models.dvae_objective import DVAESchedule
from pipelines.data.storage import Location
from pipelines.training.stage_one_training import DVAETraining


@dataclass(frozen=True, kw_only=True)
class TrainDVAEJob(TrainStageOneJob):
    """Train the dVAE on filtered pictures. The defaults are the paper's."""

    output: Path = Path("runs/12b/dvae")
    dvae: DVAEConfig = field(default_factory=DVAEConfig)
    training: DVAETraining = field(default_factory=DVAETraining)

    @property
    def model(self) -> DVAEConfig:
        return self.dvae


TINY = TrainDVAEJob(
    output=Path("runs/quickstart/dvae"),
    filtered=Location("runs/quickstart/filtered"),
    dvae=DVAEConfig(image_size=64, vocab_size=128, n_hid=24, n_init=64, n_blk_per_group=1),
    training=DVAETraining(
        steps=1200,
        batch_samples=8,
        precision="fp32",
        schedule=DVAESchedule(
            # At its full weight from the first update on: with the paper's rise from 0, a run as
            # short as this one settles on a few codes before the term is felt.
            beta_start=6.6,
            beta_end=6.6,
            beta_steps=1,
            tau_steps=1020,
            lr_start=4e-3,
            lr_end=5e-5,
            lr_steps=1200,
            warmup_steps=30,
        ),
        crops=WHOLE_PICTURES,
        averaging=AveragingConfig(decay=0.99, every=1),
    ),
    cadence=TINY_CADENCE,
    workers=WorkersConfig(num_workers=2),
    loaders=LoadersConfig(per_worker=1),
)

PRESETS: dict[str, tuple[str, TrainDVAEJob]] = {
    "tiny": ("The quickstart's: 64 px to an 8×8 grid of 128 codes, two CPU cores, minutes.", TINY),
    "paper": (
        "The paper's: 97.6 M parameters, 64 GPUs of 16 GB, 3,000,000 updates.",
        TrainDVAEJob(),
    ),
}
