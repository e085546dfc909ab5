"""The record of a run: a JSON line per entry on disk always, MLflow when it answers.

The driver opens the run; rank 0 of a training reopens it by id. A dead MLflow costs one warning.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pipelines.data.storage import Location, canonical_json, replace_file

METRICS_FILE = "metrics.jsonl"
RUN_FILE = ".mlflow_run.json"
PARAM_LENGTH = 500  # what every MLflow backend stores of a parameter's value


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where a run is entered in MLflow; the server's address is MLFLOW_TRACKING_URI."""

    experiment: str = "manray"
    """MLflow experiment that joins the stages of one way from URLs to samples."""


class Tracker:
    """Writes metrics and pictures of one run. Used by one process at a time."""

    def __init__(self, directory: Path, uri: str, run_id: str | None) -> None:
        self.run_id = run_id
        self.uri = uri
        self._file = directory / METRICS_FILE
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._client = client_of(uri) if run_id else None

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Enter numbers at a step; non-finite ones are entered as they are."""
        self._append({"step": step} | dict(metrics))
        entities = _entities()
        now = int(time.time() * 1000)
        batch = [entities.Metric(key, float(value), now, step) for key, value in metrics.items()]
        self._send("log_batch", metrics=batch)

    def notice(self, text: str, step: int) -> None:
        """Enter words that a person must read: the driver shows them, MLflow keeps the last."""
        self._append({"step": step, "notice": text})
        self.set_tags({"notice": f"update {step}: {text}"})

    def rewind(self, step: int) -> None:
        """Forget the metrics after a step, which a resumed training will enter again."""
        if not self._file.exists():
            return
        rows = [line for line in self._file.read_text().splitlines() if line.endswith("}")]
        kept = [row for row in rows if json.loads(row)["step"] <= step]
        replace_file(self._file, "".join(f"{row}\n" for row in kept).encode())

    def log_image(self, key: str, image: np.ndarray, step: int) -> None:
        """Enter a picture (height, width, 3) uint8 under a key, shown per step by the MLflow UI."""
        self._send("log_image", image, key=key, step=step)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Enter a config, flattened to ``part.field``."""
        entities = _entities()
        flat = [entities.Param(key, str(value)[:PARAM_LENGTH]) for key, value in _flatten(params)]
        self._send("log_batch", params=flat)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        entities = _entities()
        self._send("log_batch", tags=[entities.RunTag(k, v) for k, v in tags.items()])

    def log_file(self, path: Path) -> None:
        """Keep a file beside the run."""
        self._send("log_artifact", str(path))

    def finish(self, status: str) -> None:
        self._send("set_terminated", status=status)

    def _append(self, row: Mapping[str, Any]) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps(dict(row) | {"time": round(time.time(), 3)}) + "\n")

    def _send(self, method: str, *args: Any, **arguments: Any) -> None:
        if self._client is None:
            return
        try:
            getattr(self._client, method)(self.run_id, *args, **arguments)
        except failures() as error:
            self._client = None
            _warn(self.uri, error, self._file)


@contextmanager
def open_run(
    config: TrackingConfig,
    *,
    stage: str,
    settings: Mapping[str, Any],
    tags: Mapping[str, str],
    directory: Path,
    uri: str,
) -> Iterator[Tracker]:
    """The MLflow run of an output, ended as FINISHED, FAILED or KILLED by how the block ends.

    A job that goes on where it stopped goes on in the run it had.
    """
    run_id = _reopen_run(directory, uri)
    if run_id is None:
        run_id = _create_run(config, stage=stage, tags=tags, directory=directory, uri=uri)
    tracker = Tracker(directory, uri, run_id)
    tracker.log_params(settings)
    try:
        yield tracker
    except KeyboardInterrupt:
        tracker.finish("KILLED")
        raise
    except BaseException:
        tracker.finish("FAILED")
        raise
    tracker.finish("FINISHED")


def run_id_of(directory: Path | Location) -> str:
    """The MLflow run that made an output; empty if MLflow was away."""
    file = Location(directory) / RUN_FILE
    return str(json.loads(file.read())["run_id"]) if file.exists() else ""


def _reopen_run(directory: Path, uri: str) -> str | None:
    file = directory / RUN_FILE
    if not file.exists() or json.loads(file.read_bytes())["uri"] != uri:
        return None
    try:
        run_id = run_id_of(directory)
        client_of(uri).update_run(run_id, status="RUNNING")
        return run_id
    except failures():
        return None  # the database was removed, or MLflow is away: creating a run will tell


def _create_run(
    config: TrackingConfig, *, stage: str, tags: Mapping[str, str], directory: Path, uri: str
) -> str | None:
    try:
        client = client_of(uri)
        experiment = client.get_experiment_by_name(config.experiment)
        if experiment is None:
            location = _local_artifacts(uri)
            experiment_id = client.create_experiment(config.experiment, artifact_location=location)
        else:
            experiment_id = experiment.experiment_id
        run = client.create_run(experiment_id, run_name=stage, tags={"stage": stage} | dict(tags))
        record = {"uri": uri, "run_id": str(run.info.run_id)}
        replace_file(directory / RUN_FILE, canonical_json(record))
        return record["run_id"]
    except failures() as error:
        _warn(uri, error, directory / METRICS_FILE)
        return None


def _local_artifacts(uri: str) -> str | None:
    """Pictures lie beside a local database; a server keeps them where it was told to."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()


def _warn(uri: str, error: Exception, file: Path) -> None:
    first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
    print(
        f"MLflow at {uri} does not answer ({first_line[:200]}); going on without it, "
        f"the metrics are in {file}",
        file=sys.stderr,
        flush=True,
    )


def _flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def client_of(uri: str) -> Any:
    """A client of the MLflow at an address."""
    import logging

    from mlflow import MlflowClient

    # Creating a new SQLite file prints a page of migrations.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def _entities() -> ModuleType:
    from mlflow import entities

    return entities


def failures() -> tuple[type[Exception], ...]:
    """What an MLflow that is away, full or misconfigured raises."""
    from mlflow.exceptions import MlflowException

    return (MlflowException, OSError)
