"""The commit protocol: how a stage writes a dataset so that no row is lost or doubled.

A shard is attempted under a name of its own, read back, and committed by one create-once record
that names the attempt. Two workers on the same shard, a killed worker or a killed driver change
nothing: the first record wins, and `manifest.json`, written when every shard has one, is all that
readers trust.
"""

import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.data import plan
from pipelines.data.schema import DROPPED
from pipelines.data.storage import canonical_json, create_once, sha256_file

MANIFEST = "manifest.json"


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

    path: Path
    stage: str
    config: dict[str, Any]
    inputs: dict[str, str]
    sources: dict[str, str]
    """Where the inputs were when this was made, by name; not part of the digest."""
    shards: list[ShardCommit] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path, *, stage: str | None = None) -> "Manifest":
        """Read a finished dataset; raises NotADataset if it is missing, unfinished or another's."""
        file = path / MANIFEST
        if not file.exists():
            state = "is not finished" if (path / plan.PLAN).exists() else "is no dataset"
            raise NotADataset(
                f"{path} must be a finished dataset (with {MANIFEST}), but it {state}: "
                f"run the job that makes it{f' ({stage})' if stage else ''} first"
            )
        content = json.loads(file.read_bytes())
        if stage is not None and content["stage"] != stage:
            raise NotADataset(f"{path} must be made by {stage}, got one by {content['stage']}")
        shards = [ShardCommit(**shard) for shard in content.pop("shards")]
        return cls(path=path, shards=shards, **content)

    @property
    def rows_in(self) -> int:
        return sum(shard.rows_in for shard in self.shards)

    @property
    def rows_out(self) -> int:
        return sum(shard.rows_out for shard in self.shards)

    @property
    def dropped(self) -> dict[str, int]:
        """Rows dropped by reason, most frequent first."""
        total: Counter[str] = Counter()
        for shard in self.shards:
            total.update(shard.dropped)
        return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))

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
        commit = self._commit(shard)
        return _read_parquet(self.path / commit.file, columns)

    def read_dropped(self, shard: str) -> pa.Table:
        """The dropped rows of one shard, with reasons."""
        return _read_parquet(self.path / self._commit(shard).dropped_file, None)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The kept rows, shard by shard."""
        for shard in self.shards:
            yield self.read(shard.shard, columns)

    def _commit(self, shard: str) -> ShardCommit:
        for commit in self.shards:
            if commit.shard == shard:
                return commit
        raise ValueError(f"{self.path} must have shard {shard}, it has {len(self.shards)} others")


@dataclass(frozen=True, kw_only=True)
class DatasetWriter:
    """Writes one dataset; holds no open file, so that it travels to workers."""

    path: Path
    stage: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    sources: Mapping[str, str]
    shards: Sequence[str]

    def claim(self) -> None:
        """Make the output ours, see `plan.claim`."""
        plan.claim(
            self.path,
            stage=self.stage,
            config=self.config,
            inputs=self.inputs,
            shards=self.shards,
        )

    def pending(self) -> list[str]:
        """The shards that have no commit yet."""
        return [shard for shard in self.shards if not self._record(shard).exists()]

    def finished(self) -> bool:
        """True if the dataset is sealed; call after `claim`, which checks that it is this one."""
        return (self.path / MANIFEST).exists()

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
        name = f"attempts/{shard}.{uuid.uuid4().hex}"
        kept_file, dropped_file = f"{name}.parquet", f"{name}.dropped.parquet"
        commit = ShardCommit(
            shard=shard,
            file=kept_file,
            sha256=_write_parquet(self.path / kept_file, kept.cast(schema)),
            dropped_file=dropped_file,
            dropped_sha256=_write_parquet(self.path / dropped_file, dropped.cast(DROPPED)),
            rows_in=rows_in,
            rows_out=kept.num_rows,
            dropped=_count_reasons(dropped),
        )
        if create_once(self._record(shard), canonical_json(asdict(commit))):
            return commit
        # Somebody committed this shard first: theirs counts, our attempt is the spare.
        (self.path / kept_file).unlink()
        (self.path / dropped_file).unlink()
        return self._read_record(shard)

    def seal(self) -> Manifest:
        """Write the manifest; raises RuntimeError if a shard is missing."""
        if missing := self.pending():
            raise RuntimeError(f"{self.path} cannot be sealed: {len(missing)} shards are missing")
        manifest = Manifest(
            path=self.path,
            stage=self.stage,
            config=dict(self.config),
            inputs=dict(self.inputs),
            sources=dict(self.sources),
            shards=[self._read_record(shard) for shard in self.shards],
        )
        content = asdict(manifest)
        del content["path"]
        create_once(self.path / MANIFEST, canonical_json(content))
        return Manifest.load(self.path, stage=self.stage)

    def _record(self, shard: str) -> Path:
        return self.path / "commits" / f"{shard}.json"

    def _read_record(self, shard: str) -> ShardCommit:
        return ShardCommit(**json.loads(self._record(shard).read_bytes()))


def _write_parquet(path: Path, table: pa.Table) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # A dictionary of values that hardly repeat costs more to read than it saves.
        pq.write_table(table, path, compression="zstd", use_dictionary=False)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    if not _read_parquet(path, None).equals(table):
        raise RuntimeError(f"{path} was read back otherwise than it was written")
    return sha256_file(path)


def _read_parquet(path: Path, columns: Sequence[str] | None) -> pa.Table:
    try:
        return pq.read_table(path, columns=None if columns is None else list(columns))
    except (pa.ArrowInvalid, FileNotFoundError) as error:
        raise ValueError(f"{path} must be a readable Parquet file: {error}") from error


def _count_reasons(dropped: pa.Table) -> dict[str, int]:
    counts = pc.value_counts(dropped["reason"]).to_pylist()
    return {row["values"]: row["counts"] for row in sorted(counts, key=lambda row: row["values"])}
