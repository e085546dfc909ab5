"""Settings of `jobs.train_prior`."""

from dataclasses import dataclass, field
from pathlib import Path

from jobs.configs.job import DatasetPath, Job
from jobs.workers import WorkersConfig
from models.averaging import AveragingConfig
from models.prior import PriorConfig
from pipelines.data.storage import Location
from pipelines.training.prior_training import (
    Cadence,
    PriorOptimizerConfig,
    PriorTraining,
    ShardingConfig,
)
from pipelines.training.training_plan import PlanConfig
from pipelines.training.watchdog import WatchdogConfig


@dataclass(frozen=True, kw_only=True)
class TrainPriorJob(Job):
    """Train the prior on token shards. The defaults are the paper's 12B."""

    output: Path = Path("runs/12b/prior")
    tokens: DatasetPath = Location("runs/12b/tokens")
    """Token shards, made by encode_pairs."""
    tokenizer: Path = Path("runs/12b/tokenizer/tokenizer.json")
    dvae: Path = Path("runs/12b/dvae/dvae.safetensors")
    """A dVAE, or a VQ-VAE in its place; decodes the pictures that are sampled on the way."""
    prior: PriorConfig = field(default_factory=PriorConfig)
    training: PriorTraining = field(default_factory=PriorTraining)
    cadence: Cadence = field(default_factory=Cadence)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    workers: WorkersConfig = field(default_factory=lambda: WorkersConfig(num_workers=1024))
    plan: PlanConfig = field(default_factory=PlanConfig)
    """What --dry-run takes for granted."""

    def __post_init__(self) -> None:
        self.training.check_workers(self.workers.num_workers)


TINY = TrainPriorJob(
    output=Path("runs/quickstart/prior"),
    tokens=Location("runs/quickstart/tokens"),
    tokenizer=Path("runs/quickstart/tokenizer/tokenizer.json"),
    dvae=Path("runs/quickstart/dvae/dvae.safetensors"),
    prior=PriorConfig(
        n_layers=4,
        n_heads=4,
        d_model=160,
        text_len=32,
        text_vocab_size=1024,
        grid=8,
        image_vocab_size=128,
        conv_kernel=5,
    ),
    training=PriorTraining(
        steps=360,
        batch_samples=32,
        # bf16 would be 20 times slower on a CPU without AVX-512 BF16.
        precision="fp32",
        resblock_scaling="always",
        optimizer=PriorOptimizerConfig(
            peak_lr=5e-3,
            warmup_steps=30,
            decay="cosine",
            beta2=0.98,
            clip_norm=1.0,
            moments="fp32",
        ),
        averaging=AveragingConfig(decay=0.8, every=5),
        bpe_dropout=0.0,  # 256 captions, learned by heart
        recompute="none",
        sharding=ShardingConfig(group_size=1),  # each worker has room for the whole model
    ),
    cadence=Cadence(log_every=10, checkpoint_every=60, sample_every=180),
    workers=WorkersConfig(num_workers=2),
)

SMALL = TrainPriorJob(
    output=Path("runs/small/prior"),
    prior=PriorConfig(n_layers=12, n_heads=12, d_model=768),
    training=PriorTraining(
        steps=100_000,
        batch_samples=256,
        micro_batches=8,
        precision="bf16",
        optimizer=PriorOptimizerConfig(decay="cosine", moments="fp32"),
    ),
    workers=WorkersConfig(num_workers=1),
)
ONE_BILLION = TrainPriorJob(
    output=Path("runs/1b/prior"),
    prior=PriorConfig(n_layers=32, n_heads=24, d_model=1536),
    training=PriorTraining(
        steps=150_000,
        batch_samples=512,
        micro_batches=4,
        precision="bf16",
        optimizer=PriorOptimizerConfig(decay="cosine", moments="fp32"),
    ),
    workers=WorkersConfig(num_workers=8),
)
# The paper's smaller models (table 1): its depth and everything else, narrower.
TWO_POINT_EIGHT_BILLION = TrainPriorJob(
    output=Path("runs/2.8b/prior"),
    prior=PriorConfig(n_heads=30, d_model=1920),
    training=PriorTraining(micro_batches=4),
    workers=WorkersConfig(num_workers=32),
)
FIVE_POINT_SIX_BILLION = TrainPriorJob(
    output=Path("runs/5.6b/prior"),
    prior=PriorConfig(n_heads=42, d_model=2688),
    training=PriorTraining(micro_batches=4),
    workers=WorkersConfig(num_workers=64),
)

# What it takes for 12B to be updated on one card: 8 bytes a parameter. The batch is what fits, far
# from the paper's, so the step size is small: to go on from a trained prior, or to measure.
TWELVE_BILLION_ON_ONE_GPU = TrainPriorJob(
    output=Path("runs/12b-one-gpu/prior"),
    training=PriorTraining(
        steps=1000,
        batch_samples=5,  # one less than fits, by a plan that no GPU has confirmed
        precision="bf16",
        optimizer=PriorOptimizerConfig(
            peak_lr=1e-5,
            warmup_steps=100,
            decay="cosine",
            clip_norm=0.0,
            master="split",
            step="in_backward",
        ),
        averaging=AveragingConfig(keep_on="host"),
        recompute="selective",
    ),
    cadence=Cadence(checkpoint_every=500),
    workers=WorkersConfig(num_workers=1, device="gpu"),
)

# Memory and FLOP are the plan's (pipelines/training/training_plan.py); a test compares them.
PRESETS: dict[str, tuple[str, TrainPriorJob]] = {
    "tiny": (
        "The quickstart's: 1,620,032 parameters, an 8×8 grid, minutes on two CPU cores.",
        TINY,
    ),
    "small": (
        "123,271,680 parameters, 12 layers of 768; 7.1 GiB for 32 pictures at once on one GPU; "
        "1.9e19 FLOP in 100,000 updates of 256 pictures.",
        SMALL,
    ),
    "1b": (
        "983,018,496 parameters, 32 layers of 1536; 14.6 GiB for 16 pictures at once on each of 8 "
        "GPUs; 5.6e20 FLOP in 150,000 updates of 512 pictures.",
        ONE_BILLION,
    ),
    "2.8b": (
        "The paper's smallest: 2,928,258,816 parameters, 64 layers of 1920; 25.8 GiB for 8 "
        "pictures at once on each of 32 GPUs; 9.8e21 FLOP in the paper's updates.",
        TWO_POINT_EIGHT_BILLION,
    ),
    "5.6b": (
        "The paper's middle one: 5,684,999,424 parameters, 64 layers of 2688; 37.4 GiB for 4 "
        "pictures at once on each of 64 GPUs; 1.9e22 FLOP in the paper's updates.",
        FIVE_POINT_SIX_BILLION,
    ),
    "12b": (
        "The paper's: 12,292,833,024 parameters, 64 layers of 3968; 25.3 GiB for 1 picture on each "
        "of 1024 GPUs; 4.1e22 FLOP in 430,000 updates of 1024 pictures.",
        TrainPriorJob(),
    ),
    "12b-one-gpu": (
        "The same model's updates on one GPU of 141 GB: 8 bytes a parameter, 126.9 GiB for 5 "
        "pictures at once; 12,292,833,024 parameters; 4.7e17 FLOP in 1,000 updates.",
        TWELVE_BILLION_ON_ONE_GPU,
    ),
}
