"""Settings of `jobs.train_clip`."""

from dataclasses import dataclass, field
from pathlib import Path

from jobs.configs.job import DatasetPath, Job
from jobs.configs.stage_one import WHOLE_PICTURES
from jobs.picture_stream import LoadersConfig
from jobs.workers import WorkersConfig
from models.averaging import AveragingConfig
from models.clip import ClipConfig
from pipelines.data.storage import Location
from pipelines.training.clip_training import ClipCadence, ClipOptimizer, ClipTraining
from pipelines.training.watchdog import WatchdogConfig


@dataclass(frozen=True, kw_only=True)
class TrainClipJob(Job):
    """Train the model that ranks pictures for a prompt, on filtered pairs: CLIP's ViT-B/32."""

    output: Path = Path("runs/12b/clip")
    filtered: DatasetPath = Location("runs/12b/filtered")
    """Filtered pairs, made by filter_pairs."""
    tokenizer: Path = Path("runs/12b/tokenizer/tokenizer.json")
    dvae: Path = Path("runs/12b/dvae/dvae.safetensors")
    """A dVAE, or a VQ-VAE in its place: read if --training.redrawn is not 0."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    training: ClipTraining = field(default_factory=ClipTraining)
    cadence: ClipCadence = field(default_factory=ClipCadence)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    workers: WorkersConfig = field(default_factory=lambda: WorkersConfig(num_workers=64))
    loaders: LoadersConfig = field(default_factory=LoadersConfig)


TINY = TrainClipJob(
    output=Path("runs/quickstart/clip"),
    filtered=Location("runs/quickstart/filtered"),
    tokenizer=Path("runs/quickstart/tokenizer/tokenizer.json"),
    dvae=Path("runs/quickstart/dvae/dvae.safetensors"),
    clip=ClipConfig(
        image_size=64,
        patch_size=16,
        image_width=128,
        image_layers=3,
        image_heads=4,
        text_len=32,
        vocab_size=1024,
        text_width=96,
        text_layers=2,
        text_heads=3,
        embed_width=64,
    ),
    training=ClipTraining(
        steps=160,
        batch_samples=64,
        precision="fp32",
        optimizer=ClipOptimizer(peak_lr=1e-3, warmup_steps=16, weight_decay=0.1, clip_norm=1.0),
        crops=WHOLE_PICTURES,
        redrawn=0.5,
        averaging=AveragingConfig(decay=0.9, every=1),
    ),
    cadence=ClipCadence(log_every=20, checkpoint_every=40, validate_every=80),
    workers=WorkersConfig(num_workers=2),
    loaders=LoadersConfig(per_worker=0),
)

PRESETS: dict[str, tuple[str, TrainClipJob]] = {
    "tiny": (
        "The quickstart's: 1,035,521 parameters for 64 px, under a minute on two CPU cores.",
        TINY,
    ),
    "b32": (
        "CLIP's ViT-B/32 for 256 px: 134,380,545 parameters, 32,768 pairs an update on 64 GPUs.",
        TrainClipJob(),
    ),
}
