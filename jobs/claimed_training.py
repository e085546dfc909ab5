"""What every training job does around its training: claim the output, train once, say what is."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs import runtime
from jobs.claimed_output import make_once
from jobs.progress import FollowMetrics
from jobs.ray_session import ray_session
from pipelines.data.storage import sha256_file
from pipelines.training import tracking
from pipelines.training.run_directory import read_result
from pipelines.training.stopping import Stopped
from pipelines.training.tracking import TrackingConfig


def train_once(
    model_file: Path,
    *,
    stage: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    train: Callable[[], None],
) -> dict[str, Any]:
    """Make `model_file` by `train`, unless it is there already; its digest and last figures.

    Raises Stopped if the training has ended without a model.
    """
    make_once(model_file, stage=stage, settings=settings, inputs=inputs, make=train)
    if not model_file.exists():
        raise Stopped
    return {"model": str(model_file), "sha256": sha256_file(model_file)} | read_result(
        model_file.parent
    )


@contextmanager
def training_run(
    config: TrackingConfig,
    output: Path,
    *,
    stage: str,
    steps: int,
    settings: Mapping[str, Any],
    tags: Mapping[str, str],
    shown: Sequence[str],
) -> Iterator[str]:
    """Ray, the run in MLflow and a line of progress while workers train; gives MLflow's address.

    `shown` are the metrics that the line has.
    """
    uri = runtime.tracking_uri()
    with (
        ray_session(),
        tracking.open_run(
            config, stage=stage, settings=settings, tags=tags, directory=output, uri=uri
        ),
        FollowMetrics(output / tracking.METRICS_FILE, stage, steps, tuple(shown)),
    ):
        yield uri
