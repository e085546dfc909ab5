"""Settings of `jobs.train_prior`."""

from dataclasses import dataclass, field
from pathlib import Path

from jobs.configs.job import DatasetPath, Job
from jobs.workers import WorkersConfig
from models.averaging import AveragingConfig
from models.prior import PriorConfig
from pipelines.data.storage import Location
from pipelines.training.optimizer import PriorOptimizerConfig
from pipelines.training.prior_loop import Cadence
from pipelines.training.prior_trainer import PriorTraining


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
    workers: WorkersConfig = field(default_factory=lambda: WorkersConfig(num_workers=1024))


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
            peak_lr=5e-3, warmup_steps=30, decay="cosine", beta2=0.98, clip_norm=1.0
        ),
        averaging=AveragingConfig(decay=0.8, every=5),
        bpe_dropout=0.0,  # 256 captions, learned by heart
        recompute=False,
        keep_gathered=True,
    ),
    cadence=Cadence(log_every=10, checkpoint_every=60, sample_every=180),
    workers=WorkersConfig(num_workers=2),
)

PRESETS: dict[str, tuple[str, TrainPriorJob]] = {
    "tiny": (
        "The quickstart's: 1.6 M parameters, an 8×8 grid, minutes on two CPU cores.",
        TINY,
    ),
    "12b": (
        "The paper's: 12.29 B parameters, 1024 GPUs of 16 GB, 430,000 updates.",
        TrainPriorJob(),
    ),
}
