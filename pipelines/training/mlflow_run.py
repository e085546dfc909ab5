"""A run in MLflow: the only file that knows MLflow."""

import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.data.storage import Location, canonical_json, replace_file
from pipelines.training.outbox import Courier, Outbox, Refused

RUN_FILE = ".mlflow_run.json"
OUTBOX = ".mlflow_outbox"
# What no repetition mends; all else may be a server that is away, full or starting.
FOR_GOOD = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")


def run_id_of(directory: Path | Location) -> str:
    """The MLflow run that made an output; empty if MLflow was away."""
    file = Location(directory) / RUN_FILE
    return str(json.loads(file.read())["run_id"]) if file.exists() else ""


class MlflowRun:
    """A run in MLflow, found or made when the first entry is delivered."""

    def __init__(
        self,
        experiment: str,
        *,
        stage: str,
        tags: Mapping[str, str],
        directory: Path,
        uri: str,
    ) -> None:
        self.experiment, self.stage, self.tags = experiment, stage, tags
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
                self._client.log_batch(run_id, tags=_tags(values))
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
            self._client.log_batch(run_id, tags=_tags(self.tags))
        except MlflowException as error:
            if error.error_code in FOR_GOOD:  # the database was removed
                return ""
            raise
        return run_id

    def _created(self) -> str:
        experiment = self._client.get_experiment_by_name(self.experiment)
        if experiment is None:
            location = _local_artifacts(self.uri)
            experiment_id = self._client.create_experiment(
                self.experiment, artifact_location=location
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


def _tags(values: Mapping[str, str]) -> list[Any]:
    from mlflow.entities import RunTag

    return [RunTag(name, value) for name, value in values.items()]


def client_of(uri: str) -> Any:
    """MLflow's client, without its page of words."""
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
