"""What every job has."""

from dataclasses import dataclass, field
from pathlib import Path

from pipelines.training.tracking import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class Job:
    """Fields that every job shares."""

    output: Path
    """Directory that the job makes; run the same line again to go on where it stopped."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    dry_run: bool = False
    """Print the resolved settings and the plan, and run nothing."""
