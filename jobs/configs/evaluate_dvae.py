"""Settings of `jobs.evaluate_dvae`."""

from dataclasses import dataclass, field
from pathlib import Path

from jobs.configs.job import DatasetPath, Job
from pipelines.data.storage import Location
from pipelines.evaluation.reconstruction import ReconstructionConfig
from pipelines.sampling.loading import DeviceChoice


@dataclass(frozen=True, kw_only=True)
class EvaluateDVAEJob(Job):
    """Judge a dVAE or a VQ-VAE: bounds, likeness, use of its codes, its worst and best pictures."""

    output: Path = Path("runs/12b/reconstruction")
    filtered: DatasetPath = Location("runs/12b/filtered")
    """Filtered pairs whose pictures are reconstructed."""
    dvae: Path = Path("runs/12b/dvae/dvae.safetensors")
    """A dVAE or a VQ-VAE: trained here, or imported."""
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    batch_samples: int = 16
    """Pictures that are computed at once, each about 0.4 GB at the paper's size; changes the result
    by rounding alone."""
    device: DeviceChoice = "cpu_or_gpu"

    def __post_init__(self) -> None:
        if self.batch_samples < 1:
            raise ValueError(f"batch_samples must be at least 1, got {self.batch_samples}")


TINY = EvaluateDVAEJob(
    output=Path("runs/quickstart/reconstruction"),
    filtered=Location("runs/quickstart/filtered"),
    dvae=Path("runs/quickstart/dvae/dvae.safetensors"),
)

PRESETS: dict[str, tuple[str, EvaluateDVAEJob]] = {
    "tiny": ("The quickstart's dVAE on the pictures it was trained on.", TINY),
    "12b": ("A dVAE of the paper's size on 10,000 pictures; wants a GPU.", EvaluateDVAEJob()),
}
