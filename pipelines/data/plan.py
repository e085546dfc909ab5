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

from pipelines.data import s3_lease
from pipelines.data.storage import Location, canonical_json

PLAN = "plan.json"
LOCK = ".lock"
_REMEDY = "put back what was there, or remove the dataset and run its job again"


class OutputConflict(ValueError):
    """The output already belongs to another stage, config or input."""


class OutputBusy(ValueError):
    """Another driver is writing this output now."""


class DamagedFile(ValueError):
    """A file of the protocol that does not hold what was written to it."""


def claim(
    path: Path | Location,
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
    place = Location(path).resolve()
    if not (place / PLAN).exists() and (foreign := _foreign_files(place)):
        raise OutputConflict(
            f"{place} must be empty or made by this job, got other files in it "
            f"({', '.join(foreign[:3])}): choose another --output"
        )
    if (place / PLAN).create_once(wanted):
        return
    found = (place / PLAN).read()
    if found != wanted:
        read_json(place / PLAN)
        raise OutputConflict(
            f"{place} was made with other settings or inputs; nothing was written. "
            f"Choose another --output, or the settings it has:\n{difference(found, wanted)}"
        )


def read_plan(path: Path | Location) -> dict[str, Any] | None:
    """The plan of an output, None if nobody has claimed it."""
    file = Location(path) / PLAN
    return read_json(file) if file.exists() else None


def read_json(file: Location) -> dict[str, Any]:
    """The object in a JSON file; raises DamagedFile with the place where it stops being one."""
    try:
        content = json.loads(file.read().decode())
    except UnicodeDecodeError as error:
        raise DamagedFile(
            f"{file} must be UTF-8, but the byte at {error.start} is not: {_REMEDY}"
        ) from error
    except json.JSONDecodeError as error:
        raise DamagedFile(f"{file} must be JSON, but it is not ({error}): {_REMEDY}") from error
    if not isinstance(content, dict):
        raise DamagedFile(f"{file} must be a JSON object, got {type(content).__name__}: {_REMEDY}")
    return content


@contextmanager
def lease(path: Path | Location) -> Iterator[None]:
    """Hold an output for this process.

    On disk, the system frees it when the process ends, however it ends. In S3, it ends some time
    after the last sign of life, see `s3_lease`. Raises OutputBusy with the holder's name.
    """
    place = Location(path)
    if place.is_s3:
        with s3_lease.hold(place / s3_lease.LEASE) as holder:
            if holder is not None:
                raise _busy(place, holder)
            yield
    else:
        with _lock(place.path):
            yield


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    path.mkdir(parents=True, exist_ok=True)
    with (path / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise _busy(Location(path), holder) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _busy(place: Location, holder: str) -> OutputBusy:
    return OutputBusy(
        f"{place} must have one writer at a time, but {holder} holds it: "
        "wait for it, or end it and run the same line again"
    )


def _foreign_files(place: Location) -> list[str]:
    if place.is_s3:
        names = {entry.name.partition("/")[0] for entry in place.list()}
    else:
        names = {entry.name for entry in place.path.iterdir()} if place.path.is_dir() else set()
    return sorted(name for name in names if not name.startswith("."))


def difference(found: bytes, wanted: bytes) -> str:
    """The lines in which two JSON files differ, as a unified diff."""
    lines = difflib.unified_diff(
        found.decode().splitlines(),
        wanted.decode().splitlines(),
        "there",
        "asked for",
        lineterm="",
        n=0,
    )
    return "\n".join(list(lines)[:40])
