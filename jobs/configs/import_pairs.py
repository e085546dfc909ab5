"""What jobs.import_pairs can be told."""

from dataclasses import dataclass, field
from pathlib import Path

from jobs.configs.job import DatasetPath, Job
from pipelines.data.bad_files import OnBadFile
from pipelines.data.importing import ImportConfig
from pipelines.data.resize import ResizeConfig
from pipelines.data.storage import Location


@dataclass(frozen=True, kw_only=True)
class ImportPairsJob(Job):
    """Take over what img2dataset has downloaded (output_format webdataset or parquet)."""

    images: Path = Path("runs/paper/img2dataset")
    """img2dataset's output directory: its tars with their Parquet files, or its Parquet files."""
    on_bad_file: OnBadFile = "fail"
    """A file that is cut off, damaged or without the columns: end, or leave its shard out and say
    so in the dataset, its report and the summary; that reads every file once more."""
    output: DatasetPath = Location("runs/paper/raw")
    """Dataset directory to make; run the same line again to go on where it stopped."""
    importing: ImportConfig = field(default_factory=ImportConfig)
    cpus_per_shard: float = 1.0
    """Processors that Ray reserves for a shard."""

    def __post_init__(self) -> None:
        if self.cpus_per_shard <= 0:
            raise ValueError(f"cpus_per_shard must be positive, got {self.cpus_per_shard}")


PRESETS = {
    "tiny": (
        "the quickstart's sizes: 96 px PNG",
        ImportPairsJob(
            images=Path("runs/quickstart/img2dataset"),
            output=Location("runs/quickstart/raw"),
            importing=ImportConfig(resize=ResizeConfig(short_side=96, encoding="png")),
        ),
    ),
    "paper": ("384 px JPEG, as jobs.download_pairs stores them", ImportPairsJob()),
}
