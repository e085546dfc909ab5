"""Settings of `jobs.encode_pairs`."""

from dataclasses import dataclass, field
from pathlib import Path

from jobs.configs.job import DatasetPath, Job
from pipelines.data.crops import CropConfig
from pipelines.data.encoding_config import EncodingConfig
from pipelines.data.storage import Location


@dataclass(frozen=True, kw_only=True)
class EncodePairsJob(Job):
    """Encode filtered pictures to token shards. The defaults are the paper's crops."""

    output: DatasetPath = Location("runs/12b/tokens")
    filtered: DatasetPath = Location("runs/12b/filtered")
    """Filtered pairs, made by filter_pairs."""
    dvae: Path = Path("runs/12b/dvae/dvae.safetensors")
    """A dVAE, or a VQ-VAE in its place."""
    tokenizer: Path = Path("runs/12b/tokenizer/tokenizer.json")
    """Captions are stored raw; the shards only name the tokenizer that they are meant for."""
    encoding: EncodingConfig = field(default_factory=EncodingConfig)
    encoders: int = 1
    """Processes that hold a model each."""
    decoders: int = 1
    """Single-threaded processes that cut the squares for them, one CPU each or a part of one."""
    device: str = "cpu_or_gpu"
    """"cpu", "gpu", or "cpu_or_gpu": GPUs if the cluster has enough of them for all encoders."""
    gpus_per_encoder: float = 1.0
    """GPUs, or the part of one, that an encoder takes if it runs on GPUs."""

    def __post_init__(self) -> None:
        if self.encoders < 1 or self.decoders < 1:
            raise ValueError(
                f"encoders and decoders must be at least 1, got {self.encoders}, {self.decoders}"
            )
        if self.device not in ("cpu", "gpu", "cpu_or_gpu"):
            raise ValueError(f"device must be cpu, gpu or cpu_or_gpu, got {self.device!r}")
        if not 0 < self.gpus_per_encoder <= 1:  # an encoder uses one GPU
            raise ValueError(
                f"gpus_per_encoder must be above 0 and at most 1, got {self.gpus_per_encoder}"
            )


TINY = EncodePairsJob(
    output=Location("runs/quickstart/tokens"),
    filtered=Location("runs/quickstart/filtered"),
    dvae=Path("runs/quickstart/dvae/dvae.safetensors"),
    tokenizer=Path("runs/quickstart/tokenizer/tokenizer.json"),
    encoding=EncodingConfig(
        # The whole picture: 512 of them are too few to learn the crops' variety from.
        crops=CropConfig(scale_low=1.0, scale_high=1.0, slack_low=0.5, slack_high=0.5, flip=False),
        precision="fp32",  # half precision is slow on a CPU
    ),
)

PRESETS: dict[str, tuple[str, EncodePairsJob]] = {
    "tiny": ("The quickstart's: whole pictures of 64 px, one encoder.", TINY),
    "paper": (
        "The paper's: 256 px crops in fp16, an encoder on each of eight GPUs.",
        EncodePairsJob(encoders=8, decoders=32),
    ),
}
