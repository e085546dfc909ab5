"""What every job has."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from pipelines.data.storage import Location
from pipelines.training.tracking import TrackingConfig

# A dataset's place, as it is typed: Path would make one slash of the two in s3://.
DatasetPath = Annotated[
    Location,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH|s3://BUCKET/KEY",
        instance_from_str=lambda words: Location(words[0]),
        is_instance=lambda value: isinstance(value, Location),
        str_from_instance=lambda value: [str(value)],
    ),
]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Fields that every job shares."""

    output: Path | Location
    """Directory that the job makes; run the same line again to go on where it stopped."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    dry_run: bool = False
    """Print the resolved settings and the plan, and run nothing."""
