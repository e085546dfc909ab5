"""Verifying a dataset: every file that counts is there, is what was written, and loses no row."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data import plan
from pipelines.data.schema import DROPPED
from pipelines.data.stage import COMMITS, MANIFEST, Manifest, NotADataset, ShardCommit, read_commit
from pipelines.data.storage import Location


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that is not as it was written."""

    file: str
    what: str


def check(place: Location) -> Iterator[Fault]:
    """The faults of a dataset, finished or not, as they are found; one shard is held at a time.

    Raises NotADataset if nobody has claimed the place.
    """
    try:
        written = plan.read_plan(place)
    except plan.DamagedFile as error:
        yield Fault(file=plan.PLAN, what=str(error))
        return
    if written is None:
        raise NotADataset(f"{place} must be a dataset, but it has no {plan.PLAN}")
    commits: list[ShardCommit] = []
    for shard in written["shards"]:
        file = f"{COMMITS}/{shard}.json"
        try:
            commits.append(read_commit(place / file))
        except FileNotFoundError:
            yield Fault(file=file, what="is missing: run the dataset's job again")
        except plan.DamagedFile as error:
            yield Fault(file=file, what=str(error))
    schema: pa.Schema | None = None
    for commit in commits:
        for fault_or_schema in _check_shard(place, commit, schema):
            if isinstance(fault_or_schema, Fault):
                yield fault_or_schema
            else:
                schema = fault_or_schema
    yield from _check_manifest(place, written, commits)


def _check_shard(
    place: Location, commit: ShardCommit, schema: pa.Schema | None
) -> Iterator[Fault | pa.Schema]:
    """Its faults, and the schema of its rows for the next shard to have the same."""
    lost = sum(commit.dropped.values())
    if commit.rows_in != commit.rows_out + lost:
        yield Fault(
            file=f"{COMMITS}/{commit.shard}.json",
            what=f"{commit.rows_in} rows came in, {commit.rows_out} kept + {lost} dropped",
        )
    kept = _read(place, commit.file, commit.sha256)
    if isinstance(kept, Fault):
        yield kept
    else:
        yield from _check_rows(commit.file, kept, commit.rows_out, schema)
        yield kept.schema
    dropped = _read(place, commit.dropped_file, commit.dropped_sha256)
    if isinstance(dropped, Fault):
        yield dropped
        return
    yield from _check_rows(commit.dropped_file, dropped, lost, DROPPED)
    reasons = {r["values"]: r["counts"] for r in dropped["reason"].value_counts().to_pylist()}
    if reasons != commit.dropped:
        yield Fault(file=commit.dropped_file, what=f"has {reasons}, not {commit.dropped}")


def _read(place: Location, name: str, sha256: str) -> pa.Table | Fault:
    try:
        data = (place / name).read()
    except FileNotFoundError:
        return Fault(file=name, what="is missing")
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        return Fault(file=name, what=f"has {len(data)} bytes of SHA-256 {found}, not {sha256}")
    try:
        return pq.read_table(pa.BufferReader(data))
    except (pa.ArrowInvalid, OSError) as error:
        return Fault(file=name, what=f"is no readable Parquet file: {error}")


def _check_rows(name: str, table: pa.Table, rows: int, schema: pa.Schema | None) -> Iterator[Fault]:
    if table.num_rows != rows:
        yield Fault(file=name, what=f"has {table.num_rows} rows, not {rows}")
    if schema is not None and not table.schema.equals(schema, check_metadata=True):
        yield Fault(
            file=name, what=f"has the columns {table.schema.names}, of other types or names"
        )


def _check_manifest(
    place: Location, written: dict[str, object], commits: list[ShardCommit]
) -> Iterator[Fault]:
    try:
        manifest = Manifest.load(place)
    except NotADataset:
        yield Fault(file=MANIFEST, what="is missing: run the dataset's job again")
        return
    except plan.DamagedFile as error:
        yield Fault(file=MANIFEST, what=str(error))
        return
    for name in ("stage", "config", "inputs"):
        if getattr(manifest, name) != written[name]:
            yield Fault(file=MANIFEST, what=f"has another {name} than {plan.PLAN}")
    if manifest.shards != commits:
        yield Fault(file=MANIFEST, what=f"names other commits than {COMMITS}/ has")
