"""jobs.data_status says what there is of a dataset, finished or not."""

import json
from pathlib import Path

import pytest

from jobs import data_status
from tests.unit.test_stage import commit, writer


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_a_finished_dataset_is_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = writer(tmp_path / "out")
    for shard in made.pending():
        commit(made, shard)
    made.seal()
    assert data_status.main([str(tmp_path / "out")]) == 0
    lines = said(capsys)
    assert lines[0].endswith("finished, 3 of 3 shards")
    assert lines[2].split()[:5] == ["00000", "3", "2", "1", "1"]
    assert lines[5].split()[:5] == ["all", "9", "6", "3", "3"]
    assert lines[6].split()[-1] == "3"  # the one reason
    assert max(map(len, lines[1:])) <= 80


def test_what_is_missing_comes_first_and_other_attempts_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = writer(tmp_path / "out")
    made.claim()
    commit(made, "00001")
    attempts = tmp_path / "out/attempts"
    for name in ("00000.aa.parquet", "00000.aa.dropped.parquet", "00001.bb.parquet"):
        (attempts / name).write_bytes(b"x" * 1000)
    assert data_status.main([str(tmp_path / "out"), "--shards", "2"]) == 0
    lines = said(capsys)
    assert lines[0].endswith("not finished, 1 of 3 shards")
    assert lines[2].split() == ["00000", "missing", "1", "2.0", "kB"]
    assert lines[3].split()[:3] == ["00002", "missing", "0"]
    assert lines[4] == "… and 1 more: --shards 0"
    assert data_status.main([str(tmp_path / "out"), "--json"]) == 0
    (line,) = said(capsys)
    shards = {shard["shard"]: shard for shard in json.loads(line)["shards"]}
    assert shards["00001"]["committed"]
    assert shards["00001"]["other_attempts"] == 1
    assert shards["00000"]["written"] is None


def test_what_is_no_dataset_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data_status.main([str(tmp_path)]) == 2
    assert "must be a dataset" in capsys.readouterr().err
    made = writer(tmp_path / "out")
    made.claim()
    commit(made, "00001")
    record = tmp_path / "out/commits/00001.json"
    record.write_bytes(record.read_bytes()[:20])
    assert data_status.main([str(tmp_path / "out")]) == 2
    assert "00001.json" in capsys.readouterr().err
