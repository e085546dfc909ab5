"""What every job does whose output is a file that is made once."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jobs import runtime
from pipelines.data import plan
from pipelines.training import tracking


def make_once(
    file: Path,
    *,
    stage: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    make: Callable[[], None],
) -> None:
    """Make `file` by `make`, which writes it last, unless it is there already.

    Its directory belongs to these settings and inputs, and to one driver at a time. What MLflow has
    missed of a finished output is delivered.
    """
    with plan.lease(file.parent):
        plan.claim(file.parent, stage=stage, config=settings, inputs=inputs)
        if file.exists():
            runtime.nothing_to_do(file)
            tracking.catch_up(file.parent, runtime.tracking_uri())
        else:
            make()
