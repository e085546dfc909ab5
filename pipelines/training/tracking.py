"""The record of a run: a JSON line per entry on disk always, MLflow when it answers.

The driver opens the run and delivers what it and rank 0 of a training enter; nobody waits for
MLflow. Entries wait on disk while it is away, and are delivered once when it is back: in the same
run of the job, or in the next.
"""

import io
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.data.storage import canonical_json, replace_file
from pipelines.training.mlflow_run import OUTBOX, MlflowRun
from pipelines.training.outbox import Outbox

METRICS_FILE = "metrics.jsonl"
WANTED_FILE = ".mlflow_wanted.json"  # what an output's run is to be
ENTERED_FILE = ".mlflow_entered.json"
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

    A job that goes on where it stopped goes on in the run it had; the tags are the newest one's.
    """
    tracker = Tracker(directory, uri)
    wanted = {"experiment": config.experiment, "stage": stage, "tags": dict(tags)}
    replace_file(directory / WANTED_FILE, canonical_json(wanted))
    with _run(directory, uri).courier(directory / METRICS_FILE):
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


def catch_up(directory: Path, uri: str) -> None:
    """Deliver what waits since an MLflow that was away when the output's job ended."""
    if uri and Outbox(directory / OUTBOX).entries():
        with _run(directory, uri).courier(directory / METRICS_FILE):
            pass  # leaving it delivers what is left


def _run(directory: Path, uri: str) -> MlflowRun:
    wanted = json.loads((directory / WANTED_FILE).read_bytes())
    return MlflowRun(**wanted, directory=directory, uri=uri)


def _flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
