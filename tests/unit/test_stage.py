"""The commit protocol of a dataset directory."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data import plan
from pipelines.data.schema import DROPPED
from pipelines.data.shard_files import MissingColumns, read_shard, write_shard
from pipelines.data.stage import DatasetWriter, Manifest, NotADataset
from pipelines.data.storage import Location, create_once, replace_file

SCHEMA = pa.schema([pa.field("key", pa.string(), nullable=False)])


def writer(path: Path, shards: int = 3, **config: int) -> DatasetWriter:
    made = DatasetWriter(
        path=path,
        stage="count_keys",
        config={"threshold": 1} | config,
        inputs={"raw": "abc"},
        sources={"raw": str(path.parent)},
        shards=[f"{index:05d}" for index in range(shards)],
    )
    made.claim()
    return made


def tables(kept: int, dropped: int = 1) -> tuple[pa.Table, pa.Table]:
    bad = [
        {"key": f"d{i}", "url": None, "caption": None, "reason": "why", "detail": None}
        for i in range(dropped)
    ]
    keys = pa.table({"key": [f"k{i}" for i in range(kept)]}, schema=SCHEMA)
    return keys, pa.Table.from_pylist(bad, schema=DROPPED)


def commit(made: DatasetWriter, shard: str, kept: int = 2) -> None:
    good, bad = tables(kept)
    made.commit(shard, good, bad, rows_in=kept + 1, schema=SCHEMA)


def test_a_sealed_dataset_tells_rows_kept_and_dropped(tmp_path: Path) -> None:
    made = writer(tmp_path / "out")
    for shard in made.pending():
        commit(made, shard)
    made.seal()
    manifest = Manifest.load(tmp_path / "out", stage="count_keys")
    assert (manifest.rows_in, manifest.rows_out, manifest.dropped) == (9, 6, {"why": 3})
    assert manifest.read("00001")["key"].to_pylist() == ["k0", "k1"]
    assert manifest.read_dropped("00001")["reason"].to_pylist() == ["why"]


def test_a_column_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    made = writer(tmp_path / "out", shards=1)
    commit(made, "00000")
    manifest = made.seal()
    with pytest.raises(MissingColumns, match=r"must have the columns \['caption'\]"):
        manifest.read("00000", ["key", "caption"])
    error = MissingColumns(Location(tmp_path), {"split"})
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_numbers_are_stored_as_they_are_and_words_compressed(tmp_path: Path) -> None:
    table = pa.table({"word": ["a"] * 9, "tokens": pa.array([b"1234"] * 9, pa.binary(4))})
    write_shard(Location(tmp_path / "shard.parquet"), table)
    row_group = pq.ParquetFile(tmp_path / "shard.parquet").metadata.row_group(0)
    assert [row_group.column(i).compression for i in (0, 1)] == ["ZSTD", "UNCOMPRESSED"]
    assert read_shard(Location(tmp_path / "shard.parquet")).equals(table)


def test_a_lost_row_is_refused(tmp_path: Path) -> None:
    made = writer(tmp_path / "out")
    good, bad = tables(2)
    with pytest.raises(RuntimeError, match="4 rows came in, 2 kept \\+ 1 dropped"):
        made.commit("00000", good, bad, rows_in=4, schema=SCHEMA)
    assert made.pending() == list(made.shards)


def test_the_first_commit_of_a_shard_counts(tmp_path: Path) -> None:
    made = writer(tmp_path / "out", shards=1)
    commit(made, "00000", kept=2)
    commit(made, "00000", kept=5)
    assert made.seal().rows_out == 2
    assert len(list((tmp_path / "out" / "attempts").iterdir())) == 2


def test_an_unfinished_dataset_is_no_input(tmp_path: Path) -> None:
    made = writer(tmp_path / "out")
    commit(made, "00000")
    with pytest.raises(NotADataset, match="is not finished"):
        Manifest.load(tmp_path / "out")
    with pytest.raises(RuntimeError, match="2 shards are missing"):
        made.seal()


def test_a_missing_or_foreign_directory_is_no_input(tmp_path: Path) -> None:
    with pytest.raises(NotADataset, match="is no dataset"):
        Manifest.load(tmp_path / "nothing", stage="filter_pairs")
    made = writer(tmp_path / "out", shards=0)
    made.seal()
    with pytest.raises(NotADataset, match="must be made by filter_pairs, got one by count_keys"):
        Manifest.load(tmp_path / "out", stage="filter_pairs")


def test_another_config_is_refused_with_the_difference(tmp_path: Path) -> None:
    writer(tmp_path / "out")
    with pytest.raises(plan.OutputConflict) as refusal:
        writer(tmp_path / "out", threshold=2)
    assert '-  "threshold": 1' in str(refusal.value)
    assert '+  "threshold": 2' in str(refusal.value)


def test_a_directory_with_somebodys_files_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(plan.OutputConflict, match=r"thesis\.tex"):
        writer(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_digest_is_of_contents_not_of_attempts_or_places(tmp_path: Path) -> None:
    digests = set()
    for name, order in (("one", 1), ("two", -1)):
        made = writer(tmp_path / name)
        for shard in made.pending()[::order]:
            commit(made, shard)
        digests.add(made.seal().digest)
    assert len(digests) == 1
    other = writer(tmp_path / "three")
    for shard in other.pending():
        commit(other, shard, kept=3)
    assert other.seal().digest not in digests


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=8))
def test_any_order_of_commits_and_restarts_ends_in_the_same_digest(
    tmp_path_factory: pytest.TempPathFactory, undisturbed: str, events: list[tuple[int, bool]]
) -> None:
    path = tmp_path_factory.mktemp("stage") / "out"
    made = writer(path, shards=4)
    for shard, restarts in events:
        if restarts:
            made = writer(path, shards=4)
        commit(made, made.shards[shard], kept=shard)
    for shard_id in made.pending():
        commit(made, shard_id, kept=int(shard_id))
    manifest = made.seal()
    assert manifest.rows_out == 0 + 1 + 2 + 3
    assert manifest.digest == undisturbed


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = writer(tmp_path_factory.mktemp("calm") / "out", shards=4)
    for shard in made.shards:
        commit(made, shard, kept=int(shard))
    return made.seal().digest


def test_a_file_is_created_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "record.json"
    assert create_once(path, b"first")
    assert not create_once(path, b"second")
    assert path.read_bytes() == b"first"
    replace_file(path, b"third")
    assert path.read_bytes() == b"third"
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]


HOLDER = """
import sys
from pathlib import Path
from pipelines.data import plan
with plan.lease(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_is_refused_until_the_first_one_dies(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(plan.OutputBusy, match=f"process {holder.pid} on"), plan.lease(tmp_path):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with plan.lease(tmp_path):
        pass


def test_a_half_written_shard_is_named(tmp_path: Path) -> None:
    made = writer(tmp_path / "out", shards=1)
    commit(made, "00000")
    made.seal()
    manifest = Manifest.load(tmp_path / "out")
    file = tmp_path / "out" / manifest.shards[0].file
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=file.name):
        manifest.read("00000")


def test_the_plan_is_readable(tmp_path: Path) -> None:
    writer(tmp_path / "out")
    written = plan.read_plan(tmp_path / "out")
    assert written is not None
    assert json.loads((tmp_path / "out" / "plan.json").read_text()) == written
    assert plan.read_plan(tmp_path) is None
