"""What jobs.export_webdataset can be told."""

from dataclasses import dataclass
from pathlib import Path

from jobs.configs.job import DatasetPath, Job
from pipelines.data.storage import Location


@dataclass(frozen=True, kw_only=True)
class ExportWebdatasetJob(Job):
    """Write filtered pairs or token shards as WebDataset tars, one for each shard."""

    dataset: DatasetPath = Location("runs/paper/filtered")
    """Dataset made by jobs.filter_pairs or jobs.encode_pairs."""
    output: Path = Path("runs/paper/webdataset")
    """Directory to make; run the same line again to go on where it stopped."""


PRESETS = {
    "tiny": (
        "the quickstart's filtered pairs",
        ExportWebdatasetJob(
            dataset=Location("runs/quickstart/filtered"), output=Path("runs/quickstart/webdataset")
        ),
    ),
    "paper": ("the filtered pairs of a paper-sized run", ExportWebdatasetJob()),
}
