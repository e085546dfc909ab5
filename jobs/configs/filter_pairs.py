"""What jobs.filter_pairs can be told."""

from dataclasses import asdict, dataclass, field
from typing import Any

from jobs.configs.job import DatasetPath, Job
from pipelines.data.nsfw import NsfwConfig
from pipelines.data.overlap import OverlapConfig
from pipelines.data.picture_groups import NearDuplicatesConfig
from pipelines.data.row_rules import RowRulesConfig
from pipelines.data.split import PAPER_FRACTION
from pipelines.data.storage import Location


@dataclass(frozen=True, kw_only=True)
class FilterPairsJob(Job):
    """Keep the pairs that are worth learning from."""

    raw: DatasetPath = Location("runs/paper/raw")
    """Dataset made by jobs.download_pairs."""
    output: DatasetPath = Location("runs/paper/filtered")
    """Dataset directory to make; run the same line again to go on where it stopped."""
    filter: RowRulesConfig = field(default_factory=RowRulesConfig)
    near_duplicates: NearDuplicatesConfig = field(default_factory=NearDuplicatesConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    nsfw: NsfwConfig = field(default_factory=NsfwConfig)
    validation_fraction: float = PAPER_FRACTION
    """Part of the pictures that no training reads; 606,000 of 250 million in the paper."""
    cpus_per_shard: float = 1.0
    """Processors that Ray reserves for a shard."""

    def __post_init__(self) -> None:
        if self.cpus_per_shard <= 0:
            raise ValueError(f"cpus_per_shard must be positive, got {self.cpus_per_shard}")
        if not 0 <= self.validation_fraction <= 1:
            raise ValueError(
                f"validation_fraction must be in [0, 1], got {self.validation_fraction}"
            )

    @property
    def looks(self) -> bool:
        """Whether pictures are decoded."""
        looked_for = self.overlap.pictures or self.nsfw.scorer
        return self.near_duplicates.action != "off" or bool(looked_for)

    @property
    def judged(self) -> dict[str, Any]:
        """What the datasets' settings say of the judge of pictures; nothing if there is none."""
        return {"nsfw": asdict(self.nsfw)} if self.nsfw.scorer else {}


PRESETS = {
    "tiny": (
        "the quickstart's: pictures from 64 px on; seconds",
        FilterPairsJob(
            raw=Location("runs/quickstart/raw"),
            output=Location("runs/quickstart/filtered"),
            filter=RowRulesConfig(min_side=64),
            # Emoji of one style differ in less than photographs do, and 256 are all learned.
            near_duplicates=NearDuplicatesConfig(action="off"),
            validation_fraction=0.0,
            cpus_per_shard=2.0,
        ),
    ),
    "paper": (
        "the paper's filters with our thresholds, pictures from 256 px on",
        FilterPairsJob(),
    ),
}
