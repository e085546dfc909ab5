"""What jobs.download_pairs can be told."""

from dataclasses import dataclass, field

from jobs.configs.job import DatasetPath, Job
from pipelines.data.bad_files import OnBadFile
from pipelines.data.causes import parse_causes
from pipelines.data.collapse import CollapseConfig
from pipelines.data.download import DownloadConfig
from pipelines.data.fetch import FetchConfig
from pipelines.data.resize import ResizeConfig
from pipelines.data.storage import Location


@dataclass(frozen=True, kw_only=True)
class DownloadPairsJob(Job):
    """Fetch the pictures of a URL list. The defaults are for a list of the paper's size."""

    urls: DatasetPath = Location("runs/paper/urls.parquet")
    """Parquet, CSV, TSV, JSON, JSON lines or text; a file, a directory or a "*" pattern.

    TSV without a header may be caption TAB url, as Conceptual Captions has it; text is a URL a
    line, with or without TAB caption."""
    url_column: str = "url"
    caption_column: str = "caption"
    on_bad_file: OnBadFile = "fail"
    """A file of the list that is cut off, damaged or without the columns: end, or leave it out and
    say so in the dataset, its report and the summary."""
    output: DatasetPath = Location("runs/paper/raw")
    """Dataset directory to make; run the same line again to go on where it stopped."""
    download: DownloadConfig = field(default_factory=DownloadConfig)
    retry_of: DatasetPath | None = None
    """A finished download (instead of a list) of which what failed is fetched again.

    It stays as it is: OUTPUT becomes a new dataset with its kept rows and those recovered.
    "jobs.download_pairs paper --retry-of RAW --retry-failed dns,timeout,5xx --output RAW-2"."""
    retry_failed: str = "dns,timeout,connection,429,5xx"
    """With retry_of: the causes, among dns, timeout, connection, tls, 429, 4xx, 5xx, or a status
    such as http_404."""
    cpus_per_shard: float = 1.0
    """Processors that Ray reserves for a shard; the cluster's number of them bounds the speed."""
    dry_run_sample: int = 0
    """Pairs that --dry-run may fetch, to estimate the rest; by default it asks nobody anything."""

    def __post_init__(self) -> None:
        if self.cpus_per_shard <= 0:
            raise ValueError(f"cpus_per_shard must be positive, got {self.cpus_per_shard}")
        parse_causes(self.retry_failed)
        if self.retry_of is not None and self.retry_of.resolve() == self.output.resolve():
            raise ValueError(
                f"output must be another directory than retry_of, got {self.output}: "
                "a finished dataset never changes"
            )
        if self.dry_run_sample < 0:
            raise ValueError(f"dry_run_sample must be at least 0, got {self.dry_run_sample}")


PRESETS = {
    "tiny": (
        "the quickstart's: 96 px PNG in shards of 64, also from this machine; half a minute",
        DownloadPairsJob(
            urls=Location("runs/quickstart/urls.parquet"),
            output=Location("runs/quickstart/raw"),
            download=DownloadConfig(
                rows_per_shard=64,
                collapse=CollapseConfig(window=32),
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
