"""jobs.check_shards names whatever is not as it was written."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import check_shards
from pipelines.data.storage import Location
from tests.unit.test_stage import commit, writer


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    made = writer(tmp_path / "out")
    for shard in made.pending():
        commit(made, shard)
    made.seal()
    return tmp_path / "out"


def record(dataset: Path) -> dict[str, str]:
    return dict(json.loads((dataset / "commits/00001.json").read_text()))


def test_a_whole_dataset_is_called_whole(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_shards.main([str(dataset)]) == 0
    assert "whole: 3 shards, 9 rows in = 6 kept + 3 dropped" in capsys.readouterr().out


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("harm", [cut, flip, Path.unlink], ids=["cut", "flipped bit", "removed"])
@pytest.mark.parametrize("which", ["file", "dropped_file"])
def test_each_harmed_file_is_named(
    dataset: Path,
    harm: Callable[[Path], None],
    which: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = record(dataset)[which]
    harm(dataset / name)
    assert check_shards.main([str(dataset)]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"{name}: ")
    assert "1 fault(s)" in out


def test_rows_columns_and_reasons_that_do_not_fit_are_named(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import hashlib

    content = record(dataset)
    pq.write_table(pa.table({"other": [1, 2, 3]}), dataset / content["file"])
    content["sha256"] = hashlib.sha256((dataset / content["file"]).read_bytes()).hexdigest()
    changed = content | {"dropped": {"another": 1}, "rows_in": 4}
    (dataset / "commits/00001.json").write_text(json.dumps(changed))
    assert check_shards.main([str(dataset)]) == 1
    out = capsys.readouterr().out
    for words in (
        "4 rows came in, 2 kept + 1 dropped",
        "has 3 rows, not 2",
        "has the columns ['other']",
        "has {'why': 1}, not {'another': 1}",
        "manifest.json: names other commits",
    ):
        assert words in out


@pytest.mark.parametrize("name", ["plan.json", "manifest.json", "commits/00001.json"])
def test_a_damaged_record_is_named(
    dataset: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(dataset / name)
    assert check_shards.main([str(dataset)]) == 1
    assert f"{name}: " in capsys.readouterr().out


def test_an_unfinished_dataset_and_no_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = writer(tmp_path / "out")
    commit(made, "00000")
    assert check_shards.main([str(tmp_path / "out")]) == 1
    out = capsys.readouterr().out
    assert "commits/00001.json: is missing" in out
    assert "manifest.json: is missing" in out
    assert check_shards.main([str(tmp_path)]) == 2
    assert "must be a dataset" in capsys.readouterr().err


def test_gc_in_s3_removes_what_nothing_names(
    bucket: str, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = Location(f"s3://{bucket}/out")
    for entry in Location(dataset).list():
        (there / entry.name).replace((Location(dataset) / entry.name).read())
    (there / "attempts" / f"00001.{'e' * 32}.parquet").put(b"half")
    assert check_shards.main([str(there), "--gc"]) == 0
    assert "removed 1 abandoned files, 4 bytes" in capsys.readouterr().out
    assert check_shards.main([str(there)]) == 0
