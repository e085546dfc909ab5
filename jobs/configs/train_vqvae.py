"""Settings of `jobs.train_vqvae`."""

from dataclasses import dataclass, field
from pathlib import Path

from jobs.configs.stage_one import TINY_CADENCE, WHOLE_PICTURES, TrainStageOneJob
from jobs.picture_stream import LoadersConfig
from jobs.workers import WorkersConfig
from models.vqvae import VQVAEConfig
from models.vqvae_objective import QuantizerConfig, VQVAESchedule
from pipelines.data.storage import Location
from pipelines.training.stage_one_training import VQVAETraining


@dataclass(frozen=True, kw_only=True)
class TrainVQVAEJob(TrainStageOneJob):
    """Train the VQ-VAE, which every later job takes in the dVAE's place (--dvae FILE)."""

    output: Path = Path("runs/12b/vqvae")
    vqvae: VQVAEConfig = field(default_factory=VQVAEConfig)
    training: VQVAETraining = field(default_factory=VQVAETraining)
    workers: WorkersConfig = field(default_factory=lambda: WorkersConfig(num_workers=16))

    @property
    def model(self) -> VQVAEConfig:
        return self.vqvae


TINY = TrainVQVAEJob(
    output=Path("runs/quickstart/vqvae"),
    filtered=Location("runs/quickstart/filtered"),
    vqvae=VQVAEConfig(
        image_size=64, vocab_size=128, code_width=32, n_hid=24, n_init=64, n_blk_per_group=1
    ),
    training=VQVAETraining(
        steps=1200,
        batch_samples=8,
        precision="fp32",
        schedule=VQVAESchedule(lr_start=2e-3, lr_end=5e-5, lr_steps=1200, warmup_steps=30),
        quantizer=QuantizerConfig(decay=0.95),  # so short a run must forget its beginning sooner
        crops=WHOLE_PICTURES,
    ),
    cadence=TINY_CADENCE,
    workers=WorkersConfig(num_workers=2),
    loaders=LoadersConfig(per_worker=1),
)

PRESETS: dict[str, tuple[str, TrainVQVAEJob]] = {
    "tiny": ("The quickstart's sizes: 64 px to an 8×8 grid of 128 codes, two CPU cores.", TINY),
    "paper": (
        "256 px to the 32×32 grid of 8,192 codes that the paper's prior takes, on 16 GPUs.",
        TrainVQVAEJob(),
    ),
}
