"""The commit protocol: how a stage writes a dataset so that no row is lost or doubled.

A shard is attempted under a name of its own, read back, and committed by one create-once record
that names the attempt. Two workers on the same shard, a killed worker or a killed driver change
nothing: the first record wins, and `manifest.json`, written when every shard has one, is all that
readers trust.
"""

import hashlib
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data import plan
from pipelines.data.schema import DROPPED
from pipelines.data.shard_files import read_shard, write_shard
from pipelines.data.storage import Location, canonical_json

MANIFEST, COMMITS, ATTEMPTS, BEGUN = "manifest.json", "commits", "attempts", "begun"
READ_ROWS = 64
"""Rows that are read at once by those who open a shard with `open_shard`."""
"""Of a column that are read at once; 0, Arrow's default, would read the shard's whole column."""


class NotADataset(ValueError):
    """A directory that is not a finished dataset of the stage that was asked for."""


@dataclass(frozen=True, kw_only=True)
class ShardCommit:
    """What one shard holds; `file` and `dropped_file` are relative to the dataset."""

    shard: str
    file: str
    sha256: str
    dropped_file: str
    dropped_sha256: str
    rows_in: int
    rows_out: int
    dropped: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A finished dataset."""

    path: Location
    stage: str
    config: dict[str, Any]
    inputs: dict[str, str]
    sources: dict[str, str]
    """Where the inputs were when this was made, by name; not part of the digest."""
    shards: list[ShardCommit] = field(default_factory=list)

    @classmethod
    def load(cls, where: str | PathLike[str] | Location, *, stage: str | None = None) -> "Manifest":
        """Read a finished dataset; raises NotADataset if it is missing, unfinished or another's.

        Raises plan.DamagedFile if its manifest cannot be read.
        """
        path = Location(where)
        file = path / MANIFEST
        if not file.exists():
            state = "is not finished" if (path / plan.PLAN).exists() else "is no dataset"
            raise NotADataset(
                f"{path} must be a finished dataset (with {MANIFEST}), but it {state}: "
                f"run the job that makes it{f' ({stage})' if stage else ''} first"
            )
        content = plan.read_json(file)
        if stage is not None and content.get("stage") != stage:
            made_by = content.get("stage", "nobody")
            raise NotADataset(f"{path} must be made by {stage}, got one by {made_by}")
        try:
            shards = [ShardCommit(**shard) for shard in content.pop("shards")]
            return cls(path=path, shards=shards, **content)
        except (KeyError, TypeError) as error:
            raise plan.DamagedFile(f"{file} must be a manifest, but it is not: {error}") from error

    @property
    def rows_in(self) -> int:
        return sum(shard.rows_in for shard in self.shards)

    @property
    def rows_out(self) -> int:
        return sum(shard.rows_out for shard in self.shards)

    @property
    def dropped(self) -> dict[str, int]:
        """Rows dropped by reason, most frequent first."""
        return sum_reasons(shard.dropped for shard in self.shards)

    @property
    def digest(self) -> str:
        """SHA-256 of what the dataset is: not of where, when or in which attempts it was made."""
        content = {
            "stage": self.stage,
            "config": self.config,
            "inputs": self.inputs,
            "shards": [
                {key: value for key, value in asdict(shard).items() if not key.endswith("file")}
                for shard in self.shards
            ],
        }
        return hashlib.sha256(canonical_json(content)).hexdigest()

    def read(self, shard: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The kept rows of one shard."""
        return read_shard(self.path / self.commit_of(shard).file, columns)

    def read_dropped(self, shard: str) -> pa.Table:
        """The dropped rows of one shard, with reasons."""
        return read_shard(self.path / self.commit_of(shard).dropped_file)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The kept rows, shard by shard."""
        for shard in self.shards:
            yield self.read(shard.shard, columns)

    def commit_of(self, shard: str) -> ShardCommit:
        """Raises ValueError if there is no such shard."""
        for commit in self.shards:
            if commit.shard == shard:
                return commit
        raise ValueError(f"{self.path} must have shard {shard}, it has {len(self.shards)} others")


@dataclass(frozen=True, kw_only=True)
class DatasetWriter:
    """Writes one dataset; holds no open file, so that it travels to workers."""

    path: Path | Location
    stage: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    sources: Mapping[str, str]
    shards: Sequence[str]

    @property
    def place(self) -> Location:
        """`path`, on disk or in S3."""
        return Location(self.path)

    def claim(self) -> None:
        """Make the output ours, see `plan.claim`."""
        plan.claim(
            self.place,
            stage=self.stage,
            config=self.config,
            inputs=self.inputs,
            shards=self.shards,
        )

    def pending(self) -> list[str]:
        """The shards that have no commit yet."""
        committed = {entry.name for entry in (self.place / COMMITS).list()}
        return [shard for shard in self.shards if f"{shard}.json" not in committed]

    def finished(self) -> bool:
        """True if the dataset is sealed; call after `claim`, which checks that it is this one."""
        return (self.place / MANIFEST).exists()

    def commit(
        self, shard: str, kept: pa.Table, dropped: pa.Table, *, rows_in: int, schema: pa.Schema
    ) -> ShardCommit:
        """Write, read back and commit one shard; the commit that counts is returned.

        Raises RuntimeError if rows were lost or made, or if the file read back is not what was
        written.
        """
        if kept.num_rows + dropped.num_rows != rows_in:
            raise RuntimeError(
                f"shard {shard} of {self.stage}: {rows_in} rows came in, "
                f"{kept.num_rows} kept + {dropped.num_rows} dropped went out"
            )
        name = f"{ATTEMPTS}/{shard}.{uuid.uuid4().hex}"
        kept_file, dropped_file = f"{name}.parquet", f"{name}.dropped.parquet"
        commit = ShardCommit(
            shard=shard,
            file=kept_file,
            sha256=write_shard(self.place / kept_file, kept.cast(schema)),
            dropped_file=dropped_file,
            dropped_sha256=write_shard(self.place / dropped_file, dropped.cast(DROPPED)),
            rows_in=rows_in,
            rows_out=kept.num_rows,
            dropped=_count_reasons(dropped),
        )
        if self._record(shard).create_once(canonical_json(asdict(commit))):
            return commit
        winner = self.read_record(shard)
        if winner.file != kept_file:
            # Somebody committed this shard first: theirs counts, our attempt is the spare.
            (self.place / kept_file).delete()
            (self.place / dropped_file).delete()
        return winner

    def seal(self) -> Manifest:
        """Write the manifest; raises RuntimeError if a shard is missing."""
        if missing := self.pending():
            raise RuntimeError(f"{self.path} cannot be sealed: {len(missing)} shards are missing")
        manifest = Manifest(
            path=self.place,
            stage=self.stage,
            config=dict(self.config),
            inputs=dict(self.inputs),
            sources=dict(self.sources),
            shards=[self.read_record(shard) for shard in self.shards],
        )
        content = asdict(manifest)
        del content["path"]
        (self.place / MANIFEST).create_once(canonical_json(content))
        return Manifest.load(self.place, stage=self.stage)

    def read_record(self, shard: str) -> ShardCommit:
        """The commit of a shard; raises plan.DamagedFile if it cannot be read."""
        return read_commit(self._record(shard))

    def _record(self, shard: str) -> Location:
        return self.place / COMMITS / f"{shard}.json"


def sum_reasons(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Rows by reason of several shards together, most frequent first."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def read_commit(file: Location) -> ShardCommit:
    """What a commit record says; raises plan.DamagedFile if it is none."""
    content = plan.read_json(file)
    try:
        commit = ShardCommit(**content)
    except TypeError as error:
        raise plan.DamagedFile(f"{file} must be a commit record, but it is not: {error}") from error
    if file.name != f"{commit.shard}.json":
        raise plan.DamagedFile(f"{file} must be of its shard, it is of shard {commit.shard}")
    return commit


def _count_reasons(dropped: pa.Table) -> dict[str, int]:
    counts = pc.value_counts(dropped["reason"]).to_pylist()
    return {row["values"]: row["counts"] for row in sorted(counts, key=lambda row: row["values"])}
