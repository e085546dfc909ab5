"""The record of a run: a JSON line per entry on disk always, MLflow when it answers.

The driver opens the run and delivers what it and rank 0 of a training enter; nobody waits for
MLflow. Entries wait on disk while it is away, and are delivered once when it is back: in the same
run of the job, or in the next.
"""

import io
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.data.storage import Location, canonical_json, replace_file
from pipelines.training.outbox import Courier, Outbox, Refused

METRICS_FILE = "metrics.jsonl"
RUN_FILE = ".mlflow_run.json"
OUTBOX = ".mlflow_outbox"
ENTERED_FILE = ".mlflow_entered.json"
# What no repetition mends; all else may be a server that is away, full or starting.
FOR_GOOD = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")
PARAM_LENGTH = 500  # what every MLflow backend stores of a parameter's value


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where a run is entered in MLflow; the server's address is MLFLOW_TRACKING_URI."""

    experiment: str = "manray"
    """MLflow experiment that joins the stages of one way from URLs to samples."""


class Tracker:
    """Writes metrics and pictures of one run. Used by one process at a time."""

    def __init__(self, directory: Path, uri: str) -> None:
        """Entries for MLflow at `uri` wait in `directory`; an empty `uri` is no MLflow."""
        self._file = directory / METRICS_FILE
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._entered_file = directory / ENTERED_FILE
        self._outbox = Outbox(directory / OUTBOX) if uri else None
        self._entered = self._read_entered()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Enter numbers at a step; non-finite ones are entered as they are."""
        self._append({"step": step} | dict(metrics))
        new = {name: float(x) for name, x in metrics.items() if step > self._entered.get(name, -1)}
        if new:
            self._send("metrics", values=new, step=step)

    def notice(self, text: str, step: int) -> None:
        """Enter words that a person must read: the driver shows them, MLflow keeps the last."""
        self._append({"step": step, "notice": text})
        self.set_tags({"notice": f"update {step}: {text}"})

    def rewind(self, step: int) -> None:
        """Forget the metrics after a step, which a resumed training will enter again.

        In the file only: MLflow forgets nothing, and is not told twice.
        """
        if not self._file.exists():
            return
        rows = [line for line in self._file.read_text().splitlines() if line.endswith("}")]
        entered = [json.loads(row) for row in rows]
        for row in entered:
            for name in row.keys() - {"step", "time", "notice"}:
                self._entered[name] = max(row["step"], self._entered.get(name, -1))
        replace_file(self._entered_file, canonical_json(self._entered))
        kept = [text for text, row in zip(rows, entered, strict=True) if row["step"] <= step]
        replace_file(self._file, "".join(f"{text}\n" for text in kept).encode())

    def log_image(self, key: str, image: np.ndarray, step: int) -> None:
        """Enter a picture (height, width, 3) uint8 under a key, shown per step by the MLflow UI."""
        picture = io.BytesIO()
        Image.fromarray(image).save(picture, "PNG")
        self._send("image", picture.getvalue(), key=key, step=step)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Enter a config, flattened to ``part.field``."""
        flat = {key: str(value)[:PARAM_LENGTH] for key, value in _flatten(params)}
        self._send("params", values=flat)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._send("tags", values=dict(tags))

    def log_file(self, path: Path) -> None:
        """Keep a file beside the run, as it is when it is delivered."""
        self._send("file", path=str(path.resolve()))

    def finish(self, status: str) -> None:
        self._send("finish", status=status)

    def _append(self, row: Mapping[str, Any]) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps(dict(row) | {"time": round(time.time(), 3)}) + "\n")

    def _read_entered(self) -> dict[str, int]:
        """The last step of every metric that MLflow has been or will be told."""
        file = self._entered_file
        return dict(json.loads(file.read_bytes())) if file.exists() else {}

    def _send(self, kind: str, attachment: bytes = b"", **entry: Any) -> None:
        if self._outbox is not None:
            now = int(time.time() * 1000)
            self._outbox.add({"kind": kind, "time": now} | entry, attachment)


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
    tracker = Tracker(directory, uri)
    run = MlflowRun(config, stage=stage, tags=tags, directory=directory, uri=uri)
    with run.courier(directory / METRICS_FILE):
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


class MlflowRun:
    """A run in MLflow, found or made when the first entry is delivered."""

    def __init__(
        self,
        config: TrackingConfig,
        *,
        stage: str,
        tags: Mapping[str, str],
        directory: Path,
        uri: str,
    ) -> None:
        self.config, self.stage, self.tags = config, stage, tags
        self.directory, self.uri = directory, uri
        self._client: Any = None
        self._run_id = ""

    def courier(self, metrics: Path) -> Courier:
        """Delivers the directory's outbox to this run."""

        def say(error: Exception | None) -> None:
            _say(self.uri, error, metrics)

        return Courier(Outbox(self.directory / OUTBOX), self.deliver, away=(_Away,), say=say)

    def deliver(self, entry: dict[str, Any], attachment: bytes, was_tried: bool) -> None:
        """Enter what a Tracker wrote. Metrics are told from older ones by their time."""
        from mlflow import entities
        from mlflow.exceptions import MlflowException

        try:
            run_id = self._open()
            kind, now, values = entry["kind"], entry["time"], entry.get("values", {})
            if kind == "metrics":
                pairs, step = values.items(), entry["step"]
                batch = [entities.Metric(name, value, now, step) for name, value in pairs]
                self._client.log_batch(run_id, metrics=batch)
            elif kind == "params":
                batch = [entities.Param(name, value) for name, value in values.items()]
                self._client.log_batch(run_id, params=batch)
            elif kind == "tags":
                batch = [entities.RunTag(name, value) for name, value in values.items()]
                self._client.log_batch(run_id, tags=batch)
            elif kind == "image":
                self._enter_picture(entry, attachment, was_tried)
            elif kind == "file":
                self._client.log_artifact(run_id, entry["path"])
            else:
                self._client.set_terminated(run_id, status=entry["status"])
        except MlflowException as error:
            if error.error_code in FOR_GOOD:
                raise Refused(str(error)) from error
            raise _Away(str(error)) from error
        except FileNotFoundError as error:
            raise Refused(str(error)) from error
        except OSError as error:
            raise _Away(str(error)) from error

    def _enter_picture(self, entry: dict[str, Any], attachment: bytes, was_tried: bool) -> None:
        """Its name in MLflow has a random part: what may be there already is looked for."""
        now = str(entry["time"])
        if was_tried:
            there = self._client.list_artifacts(self._run_id, "images")
            if any(now in picture.path and entry["key"] in picture.path for picture in there):
                return
        pixels = np.asarray(Image.open(io.BytesIO(attachment)))
        self._client.log_image(
            self._run_id, pixels, key=entry["key"], step=entry["step"], timestamp=entry["time"]
        )

    def _open(self) -> str:
        if not self._run_id:
            self._client = client_of(self.uri)
            self._run_id = self._reopened() or self._created()
        return self._run_id

    def _reopened(self) -> str:
        from mlflow.exceptions import MlflowException

        file = self.directory / RUN_FILE
        if not file.exists() or json.loads(file.read_bytes())["uri"] != self.uri:
            return ""
        run_id = run_id_of(self.directory)
        try:
            self._client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code in FOR_GOOD:  # the database was removed
                return ""
            raise
        return run_id

    def _created(self) -> str:
        experiment = self._client.get_experiment_by_name(self.config.experiment)
        if experiment is None:
            location = _local_artifacts(self.uri)
            experiment_id = self._client.create_experiment(
                self.config.experiment, artifact_location=location
            )
        else:
            experiment_id = experiment.experiment_id
        tags = {"stage": self.stage} | dict(self.tags)
        run = self._client.create_run(experiment_id, run_name=self.stage, tags=tags)
        record = {"uri": self.uri, "run_id": str(run.info.run_id)}
        replace_file(self.directory / RUN_FILE, canonical_json(record))
        return record["run_id"]


class _Away(Exception):
    """MLflow does not answer, or not now."""


def _local_artifacts(uri: str) -> str | None:
    """Pictures lie beside a local database; a server keeps them where it was told to."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()


def _say(uri: str, error: Exception | None, metrics: Path) -> None:
    if error is None:
        words = f"MLflow at {uri} answers again; what it missed is being entered"
    else:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        words = (
            f"MLflow at {uri} refuses an entry for good ({first_line[:200]})"
            if isinstance(error, Refused)
            else f"MLflow at {uri} does not answer ({first_line[:200]}); going on without it, the "
            f"metrics are in {metrics}, and what MLflow misses waits in {metrics.parent / OUTBOX} "
            "until it answers, in this run of the job or the next"
        )
    print(words, file=sys.stderr, flush=True)


def _flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def client_of(uri: str) -> Any:
    import logging

    from mlflow import MlflowClient

    # Creating a new SQLite file prints a page of migrations.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def failures() -> tuple[type[Exception], ...]:
    """What an MLflow that is away, full or misconfigured raises."""
    from mlflow.exceptions import MlflowException

    return (MlflowException, OSError)
