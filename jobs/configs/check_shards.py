"""What jobs.check_shards can be told."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from jobs.configs.job import DatasetPath


@dataclass(frozen=True, kw_only=True)
class CheckShardsJob:
    """Read every file that counts of a dataset, and name each that is not as it was written."""

    dataset: Annotated[DatasetPath, tyro.conf.Positional]
    """A dataset on disk or in S3, finished or not."""
    gc: bool = False
    """Remove the attempts that no commit can ever name; not while its job runs."""
