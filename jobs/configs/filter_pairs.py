"""What jobs.filter_pairs can be told."""

from dataclasses import dataclass, field

from jobs.configs.job import DatasetPath, Job
from pipelines.data.filtering import FilterConfig
from pipelines.data.storage import Location


@dataclass(frozen=True, kw_only=True)
class FilterPairsJob(Job):
    """Keep the pairs that are worth learning from."""

    raw: DatasetPath = Location("runs/paper/raw")
    """Dataset made by jobs.download_pairs."""
    output: DatasetPath = Location("runs/paper/filtered")
    """Dataset directory to make; run the same line again to go on where it stopped."""
    filter: FilterConfig = field(default_factory=FilterConfig)
    cpus_per_shard: float = 1.0
    """Processors that Ray reserves for a shard."""

    def __post_init__(self) -> None:
        if self.cpus_per_shard <= 0:
            raise ValueError(f"cpus_per_shard must be positive, got {self.cpus_per_shard}")


PRESETS = {
    "tiny": (
        "the quickstart's: pictures from 64 px on; seconds",
        FilterPairsJob(
            raw=Location("runs/quickstart/raw"),
            output=Location("runs/quickstart/filtered"),
            filter=FilterConfig(min_side=64),
            cpus_per_shard=2.0,
        ),
    ),
    "paper": (
        "the paper's filters with our thresholds, pictures from 256 px on",
        FilterPairsJob(),
    ),
}
