"""What jobs.download_pairs can be told."""

from dataclasses import dataclass, field
from pathlib import Path

from jobs.configs.job import Job
from pipelines.data.download import DownloadConfig
from pipelines.data.fetch import FetchConfig
from pipelines.data.resize import ResizeConfig


@dataclass(frozen=True, kw_only=True)
class DownloadPairsJob(Job):
    """Fetch the pictures of a URL list. The defaults are for a list of the paper's size."""

    urls: Path = Path("runs/paper/urls.parquet")
    """Parquet, CSV, TSV or JSON lines with the columns url and caption."""
    output: Path = Path("runs/paper/raw")
    """Dataset directory to make; run the same line again to go on where it stopped."""
    download: DownloadConfig = field(default_factory=DownloadConfig)
    cpus_per_shard: float = 1.0
    """Processors that Ray reserves for a shard; the cluster's number of them bounds the speed."""
    dry_run_sample: int = 0
    """Pairs that --dry-run may fetch, to estimate the rest; by default it asks nobody anything."""

    def __post_init__(self) -> None:
        if self.cpus_per_shard <= 0:
            raise ValueError(f"cpus_per_shard must be positive, got {self.cpus_per_shard}")
        if self.dry_run_sample < 0:
            raise ValueError(f"dry_run_sample must be at least 0, got {self.dry_run_sample}")


PRESETS = {
    "tiny": (
        "the quickstart's: 96 px PNG in shards of 64, also from this machine; half a minute",
        DownloadPairsJob(
            urls=Path("runs/quickstart/urls.parquet"),
            output=Path("runs/quickstart/raw"),
            download=DownloadConfig(
                rows_per_shard=64,
                fetch=FetchConfig(allow_loopback=True, timeout_s=10),
                # 12/8 x 64 px, as 384 is to the paper's 256; lossless, as small as a JPEG here.
                resize=ResizeConfig(short_side=96, encoding="png"),
            ),
            cpus_per_shard=2.0,
        ),
    ),
    "paper": (
        "for the paper's 250 M pairs: 384 px JPEG in shards of 10,000, public addresses only",
        DownloadPairsJob(),
    ),
}
