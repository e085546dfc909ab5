"""An output directory belongs to one stage, one config and one driver at a time."""

import difflib
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.data.storage import canonical_json, create_once

PLAN = "plan.json"
LOCK = ".lock"


class OutputConflict(ValueError):
    """The output already belongs to another stage, config or input."""


class OutputBusy(ValueError):
    """Another driver is writing this output now."""


def claim(
    path: Path,
    *,
    stage: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    shards: Sequence[str] = (),
) -> None:
    """Write the plan of an output once; the same plan again is fine, another one is refused.

    `inputs` maps an input's name to its digest. Raises OutputConflict with a diff of the two plans.
    """
    plan = {
        "stage": stage,
        "config": dict(config),
        "inputs": dict(inputs),
        "shards": list(shards),
    }
    wanted = canonical_json(plan)
    path = path.resolve()
    if not (path / PLAN).exists() and path.is_dir() and _foreign_files(path):
        raise OutputConflict(
            f"{path} must be empty or made by this job, got other files in it "
            f"({', '.join(_foreign_files(path)[:3])}): choose another --output"
        )
    if create_once(path / PLAN, wanted):
        return
    found = (path / PLAN).read_bytes()
    if found != wanted:
        raise OutputConflict(
            f"{path} was made with other settings or inputs; nothing was written. "
            f"Choose another --output, or the settings it has:\n{_diff(found, wanted)}"
        )


def read_plan(path: Path) -> dict[str, Any] | None:
    """The plan of an output, None if nobody has claimed it."""
    file = path / PLAN
    return json.loads(file.read_bytes()) if file.exists() else None


@contextmanager
def lease(path: Path) -> Iterator[None]:
    """Hold an output for this process; the system frees it when the process ends, however it ends.

    Raises OutputBusy with the holder's name.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (path / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise OutputBusy(
                f"{path} must have one writer at a time, but {holder} holds it: "
                "wait for it, or end it and run the same line again"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _foreign_files(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))


def _diff(found: bytes, wanted: bytes) -> str:
    lines = difflib.unified_diff(
        found.decode().splitlines(),
        wanted.decode().splitlines(),
        "there",
        "asked for",
        lineterm="",
        n=0,
    )
    return "\n".join(list(lines)[:40])
