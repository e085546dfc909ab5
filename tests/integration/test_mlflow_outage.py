"""A real MLflow server that goes away and comes back: nobody waits, nothing is lost or doubled."""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from pipelines.training.mlflow_run import OUTBOX, run_id_of
from pipelines.training.outbox import Outbox
from pipelines.training.tracking import TrackingConfig, catch_up, open_run
from tests.fixtures.cut_line import Line, line_to
from tests.fixtures.ports import free_port
from tests.fixtures.waiting import until

CONFIG = TrackingConfig(experiment="outage")
PICTURE = np.zeros((8, 8, 3), np.uint8)
CALLS = 30
PATIENCE = 120.0  # seconds


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an MLflow server with a database of its own."""
    path = tmp_path_factory.mktemp("server")
    port = free_port()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--backend-store-uri", f"sqlite:///{path}/mlflow.db"),
            *("--artifacts-destination", str(path / "artifacts")),
        ],
        # Else it starts six more processes, for things that are not asked of it here.
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def is_healthy() -> bool:
        assert process.poll() is None
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
            return bool(answer.status == 200)
        return False

    try:
        until(is_healthy, PATIENCE)
        yield port
    finally:
        os.killpg(process.pid, 9)
        process.wait()


@pytest.fixture
def line(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with line_to(server) as line:
        yield line


def steps_of(client: MlflowClient, run_id: str) -> list[int]:
    return [point.step for point in client.get_metric_history(run_id, "loss")]


def test_an_outage_costs_no_time_and_no_entry(
    server: int, line: Line, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    client = MlflowClient(f"http://127.0.0.1:{server}")
    uri = f"http://127.0.0.1:{line.port}"
    waiting = Outbox(tmp_path / OUTBOX).entries
    with open_run(
        CONFIG, stage="train", settings={}, tags={}, directory=tmp_path, uri=uri
    ) as tracker:
        tracker.log_metrics({"loss": 3.0}, 0)
        until(lambda: run_id_of(tmp_path) and not waiting(), PATIENCE)
        line.cut()
        started = time.monotonic()
        for step in range(1, CALLS):
            tracker.log_metrics({"loss": 1.0 / step}, step)
        tracker.log_image("samples", PICTURE, CALLS)
        # 50 ms a call are what an MLflow that answers costs at its best; this is for a busy disk.
        assert (time.monotonic() - started) / CALLS < 0.05
        assert len(waiting()) == CALLS
        words: list[str] = []

        def said() -> list[str]:
            words.extend(capfd.readouterr().err.splitlines())
            return [row for row in words if row.startswith("MLflow at")]

        until(said, PATIENCE)
        line.mend()
        until(lambda: not waiting(), PATIENCE)
    run_id = run_id_of(tmp_path)
    assert steps_of(client, run_id) == list(range(CALLS))
    assert client.get_run(run_id).info.status == "FINISHED"
    assert len(client.list_artifacts(run_id, "images")) == 2  # the picture, and a smaller one
    assert ["does not answer" in row for row in said()] == [True, False]
    assert "answers again" in said()[1]


def test_an_answer_that_is_lost_doubles_nothing(server: int, line: Line, tmp_path: Path) -> None:
    client = MlflowClient(f"http://127.0.0.1:{server}")
    uri = f"http://127.0.0.1:{line.port}"
    waiting = Outbox(tmp_path / OUTBOX).entries
    with open_run(
        CONFIG, stage="train", settings={}, tags={}, directory=tmp_path, uri=uri
    ) as tracker:
        until(lambda: run_id_of(tmp_path) and not waiting(), PATIENCE)
        for write in (
            lambda: tracker.log_metrics({"loss": 2.0}, 1),
            lambda: tracker.log_image("samples", PICTURE, 1),
        ):
            line.lost.clear()
            line.loses_answers = True
            write()
            assert line.lost.wait(60)
            line.loses_answers = False
            until(lambda: not waiting(), PATIENCE)
    run_id = run_id_of(tmp_path)
    assert steps_of(client, run_id) == [1]
    assert len({file.path.split(".")[0] for file in client.list_artifacts(run_id, "images")}) <= 2
    pictures = [f.path for f in client.list_artifacts(run_id, "images") if f.path.endswith(".png")]
    assert len(pictures) == 1


def test_what_was_missed_in_one_run_of_a_job_is_entered_in_the_next(
    server: int, line: Line, tmp_path: Path
) -> None:
    """Also if MLflow was away from the beginning."""
    client = MlflowClient(f"http://127.0.0.1:{server}")
    uri = f"http://127.0.0.1:{line.port}"
    line.cut()
    with open_run(
        CONFIG, stage="train", settings={}, tags={}, directory=tmp_path, uri=uri
    ) as tracker:
        for step in (1, 2):
            tracker.log_metrics({"loss": 1.0}, step)
    assert run_id_of(tmp_path) == ""
    line.mend()
    with open_run(
        CONFIG, stage="train", settings={}, tags={}, directory=tmp_path, uri=uri
    ) as tracker:
        tracker.rewind(1)
        for step in (2, 3):  # as a training that goes on after update 1
            tracker.log_metrics({"loss": 1.0}, step)
    assert steps_of(client, run_id_of(tmp_path)) == [1, 2, 3]


def test_an_outage_at_the_end_is_made_good_when_the_job_is_run_again(
    server: int, line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.training.outbox.PARTING_S", 0.1)
    uri = f"http://127.0.0.1:{line.port}"
    line.cut()
    with open_run(
        CONFIG, stage="train", settings={}, tags={"a": "b"}, directory=tmp_path, uri=uri
    ) as tracker:
        tracker.log_metrics({"loss": 3.0}, 1)
    assert run_id_of(tmp_path) == ""
    line.mend()
    monkeypatch.undo()
    catch_up(tmp_path, uri)
    catch_up(tmp_path, uri)
    client = MlflowClient(f"http://127.0.0.1:{server}")
    run = client.get_run(run_id_of(tmp_path))
    assert (run.info.status, run.data.tags["a"]) == ("FINISHED", "b")
    assert steps_of(client, run.info.run_id) == [1]
