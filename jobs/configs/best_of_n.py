"""Settings of `jobs.best_of_n`."""

from dataclasses import dataclass, field
from pathlib import Path

from jobs.configs.job import DatasetPath, Job
from pipelines.data.storage import Location
from pipelines.evaluation.best_of_n import BestOfNConfig
from pipelines.sampling.loading import DeviceChoice


@dataclass(frozen=True, kw_only=True)
class BestOfNJob(Job):
    """Measure what reranking gains: how often the best of N candidates fits its prompt."""

    output: Path = Path("runs/12b/best_of_n")
    tokens: DatasetPath = Location("runs/12b/tokens")
    """Token shards of the corpus, made by encode_pairs."""
    filtered: DatasetPath = Location("runs/12b/filtered")
    """The filtered pairs that the token shards were made of: the true pictures."""
    tokenizer: Path = Path("runs/12b/tokenizer/tokenizer.json")
    dvae: Path = Path("runs/12b/dvae/dvae.safetensors")
    """A dVAE, or a VQ-VAE in its place."""
    prior: Path = Path("runs/12b/prior/prior.safetensors")
    clip: Path = Path("runs/12b/clip/clip.safetensors")
    """The reranker, made by train_clip or import_clip."""
    judge: Path | None = None
    """Another contrastive model, best one of another training, that says whether a picture fits."""
    best_of_n: BestOfNConfig = field(default_factory=BestOfNConfig)
    max_candidates: int = 32
    """Pictures that are sampled at once: bounds the memory, does not change the pictures."""
    device: DeviceChoice = "cpu_or_gpu"


TINY = BestOfNJob(
    output=Path("runs/quickstart/best_of_n"),
    tokens=Location("runs/quickstart/tokens"),
    filtered=Location("runs/quickstart/filtered"),
    tokenizer=Path("runs/quickstart/tokenizer/tokenizer.json"),
    dvae=Path("runs/quickstart/dvae/dvae.safetensors"),
    prior=Path("runs/quickstart/prior/prior.safetensors"),
    clip=Path("runs/quickstart/clip/clip.safetensors"),
    best_of_n=BestOfNConfig(pools=(1, 8, 32)),
)

PRESETS: dict[str, tuple[str, BestOfNJob]] = {
    "tiny": ("The quickstart's model and captions: two minutes on one CPU core.", TINY),
    "12b": (
        "The paper's model, the best of 512 pictures for each of 256 prompts, on a GPU of 80 GB.",
        BestOfNJob(),
    ),
}
