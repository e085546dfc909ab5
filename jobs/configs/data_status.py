"""What jobs.data_status can be told."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from jobs.configs.job import DatasetPath


@dataclass(frozen=True, kw_only=True)
class DataStatusJob:
    """Say how far datasets are, finished or not; may be asked while their jobs run."""

    datasets: Annotated[tuple[DatasetPath, ...], tyro.conf.Positional]
    """Datasets on disk or in S3."""
    shards: int = 20
    """Lines of shards for each dataset, those that are missing first; 0 for all of them."""
    json: bool = False
    """One JSON line for each dataset, with all its shards."""

    def __post_init__(self) -> None:
        if not self.datasets:
            raise ValueError("there must be at least one dataset, got none")
        if self.shards < 0:
            raise ValueError(f"shards must be 0 or more, got {self.shards}")
