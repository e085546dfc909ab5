"""jobs.train_tokenizer end to end, as a user runs it."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from jobs import train_tokenizer
from pipelines.data.plan import lease
from pipelines.data.tokenizer import CaptionTokenizer
from tests.fixtures.datasets import filtered_pairs, tiny_tokens


def arguments(path: Path, *more: str) -> list[str]:
    return ["tiny", "--filtered", str(path / "filtered"), "--output", str(path / "out"), *more]


def snapshot(path: Path) -> dict[str, bytes]:
    files = (file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def summary_of(output: str) -> dict[str, object]:
    """The last line that a job prints."""
    summary: dict[str, object] = json.loads(output.strip().splitlines()[-1])
    return summary


def test_the_tokenizer_is_made_once_and_a_second_run_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filtered_pairs(tmp_path / "filtered", rows=100)
    assert train_tokenizer.main(arguments(tmp_path)) == 0
    first = summary_of(capsys.readouterr().out)
    tokenizer = CaptionTokenizer.from_file(tmp_path / "out" / "tokenizer.json")
    assert first["captions"] == 100
    assert first["vocab_size"] == tokenizer.vocab_size
    assert first["sha256"] == tokenizer.digest
    before = snapshot(tmp_path)

    assert train_tokenizer.main(arguments(tmp_path)) == 0
    said = capsys.readouterr().out
    assert "nothing to do" in said
    assert snapshot(tmp_path) == before
    second = summary_of(said)
    assert {**second, "seconds": 0} == {**first, "seconds": 0}


def test_its_numbers_are_in_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    manifest = filtered_pairs(tmp_path / "filtered", rows=40)
    assert train_tokenizer.main(arguments(tmp_path, "--tracking.experiment", "words")) == 0
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("words")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    summary = summary_of(capsys.readouterr().out)
    assert run.info.status == "FINISHED"
    assert manifest.digest in run.data.tags.values()
    for name in ("vocab_size", "tokens_mean", "tokens_p99", "tokens_max", "cut_share"):
        assert run.data.metrics[name] == summary[name]


def test_an_mlflow_that_does_not_answer_is_said_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # discard: nobody listens
    filtered_pairs(tmp_path / "filtered", rows=8)
    assert train_tokenizer.main(arguments(tmp_path)) == 0
    assert "MLflow at http://127.0.0.1:9 does not answer" in capsys.readouterr().err
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_other_settings_or_captions_on_the_same_output_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filtered_pairs(tmp_path / "filtered", rows=16)
    assert train_tokenizer.main(arguments(tmp_path)) == 0
    before = snapshot(tmp_path / "out")
    assert train_tokenizer.main(arguments(tmp_path, "--tokenizer.vocab-size", "300")) == 2
    said = capsys.readouterr().err
    assert '"vocab_size": 1024' in said
    assert '"vocab_size": 300' in said
    filtered_pairs(tmp_path / "other", rows=17)
    assert train_tokenizer.main(arguments(tmp_path, "--filtered", str(tmp_path / "other"))) == 2
    assert snapshot(tmp_path / "out") == before


def test_a_second_driver_on_the_same_output_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filtered_pairs(tmp_path / "filtered", rows=8)
    with lease(tmp_path / "out"):
        assert train_tokenizer.main(arguments(tmp_path)) == 2
    assert "one writer at a time" in capsys.readouterr().err
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_an_input_that_is_missing_or_foreign_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_tokenizer.main(arguments(tmp_path)) == 2
    assert "filtered must be a finished dataset" in capsys.readouterr().err
    tokens = tiny_tokens(tmp_path / "made", rows=8).tokens
    assert train_tokenizer.main(arguments(tmp_path, "--filtered", str(tokens))) == 2
    assert "encode_pairs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_broken_tokenizer_in_a_finished_output_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filtered_pairs(tmp_path / "filtered", rows=8)
    assert train_tokenizer.main(arguments(tmp_path)) == 0
    path = tmp_path / "out" / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:100])
    assert train_tokenizer.main(arguments(tmp_path)) == 2
    assert f"{path} must be a tokenizer.json, but it is broken" in capsys.readouterr().err


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filtered_pairs(tmp_path / "filtered", rows=8)
    assert train_tokenizer.main(arguments(tmp_path, "--dry-run")) == 0
    said = capsys.readouterr().out
    assert "read 8 captions" in said
    assert '"vocab_size": 1024' in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argument", ["--tokenizer.vocab-sise", "--text-lenn"])
def test_an_unknown_flag_or_preset_is_a_usage_error(
    argument: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_tokenizer.main(["tiny", argument, "3"]) == 2
    assert train_tokenizer.main(["tinny"]) == 2
    assert "tiny" in capsys.readouterr().err
