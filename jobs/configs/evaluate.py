"""Settings of `jobs.evaluate`."""

from dataclasses import dataclass, field
from pathlib import Path

from jobs.configs.job import DatasetPath, Job
from pipelines.data.storage import Location
from pipelines.evaluation.protocol import EvaluationConfig
from pipelines.sampling.loading import DeviceChoice


@dataclass(frozen=True, kw_only=True)
class EvaluateJob(Job):
    """Judge a prior on a corpus: losses, retrieval of its pictures, a grid to look at."""

    output: Path = Path("runs/12b/evaluation")
    tokens: DatasetPath = Location("runs/12b/tokens")
    """Token shards of the corpus, made by encode_pairs."""
    filtered: DatasetPath = Location("runs/12b/filtered")
    """The filtered pairs that the token shards were made of: the true pictures."""
    tokenizer: Path = Path("runs/12b/tokenizer/tokenizer.json")
    dvae: Path = Path("runs/12b/dvae/dvae.safetensors")
    """A dVAE, or a VQ-VAE in its place."""
    prior: Path = Path("runs/12b/prior/prior.safetensors")
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    batch_samples: int = 32
    """Pictures that are computed at once; does not change the result."""
    device: DeviceChoice = "cpu_or_gpu"

    def __post_init__(self) -> None:
        if self.batch_samples < 1:
            raise ValueError(f"batch_samples must be at least 1, got {self.batch_samples}")


TINY = EvaluateJob(
    output=Path("runs/quickstart/evaluation"),
    tokens=Location("runs/quickstart/tokens"),
    filtered=Location("runs/quickstart/filtered"),
    tokenizer=Path("runs/quickstart/tokenizer/tokenizer.json"),
    dvae=Path("runs/quickstart/dvae/dvae.safetensors"),
    prior=Path("runs/quickstart/prior/prior.safetensors"),
)

PRESETS: dict[str, tuple[str, EvaluateJob]] = {
    "tiny": ("The quickstart's model on its own corpus: under a minute on two CPU cores.", TINY),
    "12b": (
        "The paper's model on 10,000 pictures of its corpus, on a GPU of 80 GB.",
        EvaluateJob(),
    ),
}
