"""How far a dataset is: what each of its shards holds, lost, cost and left behind."""

from dataclasses import dataclass

from pipelines.data import plan
from pipelines.data.garbage import attempt_of, shard_of
from pipelines.data.stage import COMMITS, MANIFEST, NotADataset, read_commit, sum_reasons
from pipelines.data.storage import Location


@dataclass(frozen=True, kw_only=True)
class ShardStatus:
    """One shard; the rows are 0 until it is committed."""

    shard: str
    committed: bool
    rows_in: int
    rows_out: int
    dropped: dict[str, int]
    other_attempts: int
    """Attempts besides the one that counts: of killed or slower workers, or under way now."""
    bytes: int
    """Of all attempts that are there."""
    written: float | None
    """Unix seconds of the commit, by the store's clock; None if there is none."""


@dataclass(frozen=True, kw_only=True)
class DatasetStatus:
    """A dataset on its way."""

    place: str
    stage: str
    sealed: bool
    shards: list[ShardStatus]

    @property
    def committed(self) -> int:
        return sum(shard.committed for shard in self.shards)

    @property
    def dropped(self) -> dict[str, int]:
        """Rows dropped by reason so far, most frequent first."""
        return sum_reasons(shard.dropped for shard in self.shards)


def status(place: Location) -> DatasetStatus:
    """Reads the plan, a listing and the commit records, no rows; writes nothing.

    May be asked while the dataset's job runs. Raises NotADataset if nobody has claimed the place,
    plan.DamagedFile if a record cannot be read.
    """
    written = plan.read_plan(place)
    if written is None:
        raise NotADataset(f"{place} must be a dataset, but it has no {plan.PLAN}")
    files = {entry.name: entry for entry in place.list()}
    attempts: dict[str, list[str]] = {}
    for name in files:
        if shard := shard_of(name):
            attempts.setdefault(shard, []).append(name)

    def one(shard: str) -> ShardStatus:
        names = attempts.get(shard, [])
        record = files.get(f"{COMMITS}/{shard}.json")
        commit = None if record is None else read_commit(place / record.name)
        tries = {attempt_of(name) for name in names}
        if commit is not None:
            tries.discard(attempt_of(commit.file))
        return ShardStatus(
            shard=shard,
            committed=commit is not None,
            rows_in=commit.rows_in if commit else 0,
            rows_out=commit.rows_out if commit else 0,
            dropped=commit.dropped if commit else {},
            other_attempts=len(tries),
            bytes=sum(files[name].bytes for name in names),
            written=record.written if record else None,
        )

    return DatasetStatus(
        place=str(place),
        stage=written["stage"],
        sealed=MANIFEST in files,
        shards=[one(shard) for shard in written["shards"]],
    )
