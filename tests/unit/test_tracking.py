"""Runs in MLflow, and metrics on disk when there is no MLflow."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from pipelines.training.mlflow_run import run_id_of
from pipelines.training.run_directory import run_tags
from pipelines.training.tracking import Tracker, TrackingConfig, open_run

CONFIG = TrackingConfig(experiment="test")


def uri_of(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/mlflow.db"


def rows_of(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_run_keeps_settings_tags_metrics_and_pictures_per_step(tmp_path: Path) -> None:
    out, uri = tmp_path / "out", uri_of(tmp_path)
    (tmp_path / "raw").mkdir()
    tags = run_tags({"raw": "abc"}, {"raw": tmp_path / "raw"})
    settings = {"prior": {"n_layers": 2}}
    with open_run(CONFIG, stage="train", settings=settings, tags=tags, directory=out, uri=uri):
        worker = Tracker(out, uri)  # as rank 0 of a training
        worker.log_metrics({"image_loss": 2.5}, step=10)
        worker.log_metrics({"image_loss": 1.5}, step=20)
        worker.log_image("samples", np.zeros((8, 8, 3), np.uint8), step=20)
    client = MlflowClient(uri)
    run = client.get_run(run_id_of(out))
    assert run.info.status == "FINISHED"
    assert run.data.params["prior.n_layers"] == "2"
    assert run.data.tags["raw_digest"] == "abc"
    assert len(run.data.tags["git_sha"]) == 40
    history = client.get_metric_history(run.info.run_id, "image_loss")
    assert [(point.step, point.value) for point in history] == [(10, 2.5), (20, 1.5)]
    assert [file.path for file in client.list_artifacts(run.info.run_id, "images")]
    assert [row["image_loss"] for row in rows_of(out)] == [2.5, 1.5]


def test_a_job_that_goes_on_goes_on_in_its_run(tmp_path: Path) -> None:
    out, uri = tmp_path / "out", uri_of(tmp_path)
    arguments = {"stage": "train", "settings": {}, "directory": out, "uri": uri}

    def fail() -> None:
        tags = {"layout": "wide"}
        with open_run(CONFIG, tags=tags, **arguments) as tracker:  # type: ignore[arg-type]
            tracker.log_metrics({"loss": 3.0}, step=1)
            tracker.log_metrics({"loss": 2.0}, step=2)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    first = run_id_of(out)
    assert MlflowClient(uri).get_run(first).info.status == "FAILED"
    assert MlflowClient(uri).get_run(first).data.tags["layout"] == "wide"
    tags = {"layout": "deep"}
    with open_run(CONFIG, tags=tags, **arguments) as tracker:  # type: ignore[arg-type]
        tracker.rewind(1)
        tracker.log_metrics({"loss": 2.1}, step=2)
    assert run_id_of(out) == first
    assert MlflowClient(uri).get_run(first).info.status == "FINISHED"
    assert MlflowClient(uri).get_run(first).data.tags["layout"] == "deep"
    assert [(row["step"], row["loss"]) for row in rows_of(out)] == [(1, 3.0), (2, 2.1)]


def test_an_mlflow_that_does_not_answer_costs_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as taken:  # bound but not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with open_run(
            CONFIG, stage="train", settings={}, tags={}, directory=tmp_path, uri=uri
        ) as tracker:
            for step in range(3):
                tracker.log_metrics({"loss": 1.0 / (step + 1)}, step)
                tracker.log_image("samples", np.zeros((8, 8, 3), np.uint8), step)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert uri in said[0]
    assert "going on without it" in said[0]
    assert len(rows_of(tmp_path)) == 3
    assert run_id_of(tmp_path) == ""
