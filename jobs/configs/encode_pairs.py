"""Settings of `jobs.encode_pairs`."""

from dataclasses import dataclass, field
from pathlib import Path

from jobs.configs.job import Job
from pipelines.data.crops import CropConfig
from pipelines.data.encoding import EncodingConfig


@dataclass(frozen=True, kw_only=True)
class EncodePairsJob(Job):
    """Encode filtered pictures to token shards. The defaults are the paper's crops."""

    output: Path = Path("runs/12b/tokens")
    filtered: Path = Path("runs/12b/filtered")
    """Filtered pairs, made by filter_pairs."""
    dvae: Path = Path("runs/12b/dvae/dvae.safetensors")
    tokenizer: Path = Path("runs/12b/tokenizer/tokenizer.json")
    """Captions are stored raw; the shards only name the tokenizer that they are meant for."""
    encoding: EncodingConfig = field(default_factory=EncodingConfig)
    encoders: int = 1
    """Processes that hold a dVAE each."""
    gpus_per_encoder: float = 0.0
    """GPUs that each of them takes; 0 encodes on the CPU."""


TINY = EncodePairsJob(
    output=Path("runs/quickstart/tokens"),
    filtered=Path("runs/quickstart/filtered"),
    dvae=Path("runs/quickstart/dvae/dvae.safetensors"),
    tokenizer=Path("runs/quickstart/tokenizer/tokenizer.json"),
    # The whole picture: 512 of them are too few to learn the crops' variety from.
    encoding=EncodingConfig(
        crops=CropConfig(scale_low=1.0, scale_high=1.0, slack_low=0.5, slack_high=0.5, flip=False)
    ),
    encoders=1,
)

PRESETS: dict[str, tuple[str, EncodePairsJob]] = {
    "tiny": ("The quickstart's: whole pictures of 64 px, one encoder on the CPU.", TINY),
    "paper": (
        "The paper's: 256 px crops, a dVAE on each of eight GPUs.",
        EncodePairsJob(encoders=8, gpus_per_encoder=1.0),
    ),
}
