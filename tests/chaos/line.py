"""A job's line in a process of its own, with processes where it would have Ray's workers.

Everything else is the job as it is. A worker that is killed is started again, as Ray does; one
that raises ends the job. Killed with its driver nobody is: workers of a dead driver go on.
"""

import contextlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from jobs import download_pairs, filter_pairs, runtime, shards
from pipelines.data import s3, s3_lease
from pipelines.data.stage import DatasetWriter
from tests.chaos import broken
from tests.chaos.doom import Doom, Steps

VERBS = {"download_pairs": download_pairs, "filter_pairs": filter_pairs}
WORKERS = 2
PATIENCE = {
    "CONNECT_TIMEOUT_S": 2.0,
    "READ_TIMEOUT_S": 2.0,
    "FIRST_PAUSE_S": 0.002,
    "LONGEST_PAUSE_S": 0.05,
}
FORKS = multiprocessing.get_context("forkserver")


@dataclass(frozen=True, kw_only=True)
class Line:
    """A verb with its arguments, and what happens to it."""

    verb: str
    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    log: Path
    counts: Path
    """Directory in which processes leave the number of their steps, and their ids."""
    driver: Doom
    worker: Doom
    """The first worker of `stage` on `shard` has it."""
    stage: str = ""
    shard: str = ""
    lease_s: float = 2.0
    wrong: str = ""
    """Name of a wrong protocol in `broken.py`."""


def start(line: Line) -> ForkServerProcess:
    """Start the line; its exit code is the job's, or -9."""
    # Imported once, by the server that all lines and workers are forks of.
    FORKS.set_forkserver_preload(["tests.chaos.line", "mlflow", "cld3", "pytest"])
    process = FORKS.Process(target=_run, args=(line,))
    process.start()
    return process


def _run(line: Line) -> None:
    _prepare(line)
    runtime.ray_session = contextlib.nullcontext  # type: ignore[assignment, misc]
    shards.commit_each = partial(_with_processes, line)  # type: ignore[assignment]
    steps = Steps(line.driver).install()
    code = VERBS[line.verb].main(line.arguments)
    steps.doom = Doom(place="/")
    (line.counts / "driver").write_text(str(steps.count))
    sys.stdout.flush()
    os._exit(code)


def _work(line: Line, stage_name: str, row: dict[str, Any], commit: Callable[[Any], Any]) -> None:
    _prepare(line)
    (line.counts / f"pid-{os.getpid()}").touch()
    mine = (stage_name, row["shard"]) == (line.stage, line.shard)
    steps = Steps(line.worker if mine else Doom(place=line.worker.place)).install()
    try:
        done = commit(row)
        assert not done.get("collapsed"), done
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    steps.doom = Doom(place="/")
    (line.counts / f"worker-{stage_name}").write_text(str(steps.count))
    os._exit(0)


def _prepare(line: Line) -> None:
    os.environ |= line.environment
    descriptor = os.open(line.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for name, value in PATIENCE.items():
        setattr(s3, name, value)
    s3.client.cache_clear()
    s3_lease.hold = partial(s3_lease.hold, expires_after_s=line.lease_s)  # type: ignore[assignment]
    if line.wrong:
        broken.WRONG[line.wrong]()


def _with_processes(
    line: Line,
    writer: DatasetWriter,
    commit: shards.Commit,
    pending: list[str],
    *,
    cpus: float,
    row_of: shards.RowOf = lambda _: {},
) -> dict[str, float]:
    """In the place of `shards.commit_each`."""
    left = [{"shard": shard, **row_of(shard)} for shard in pending]
    running: dict[int, tuple[ForkServerProcess, dict[str, Any]]] = {}
    try:
        while left or running:
            while left and len(running) < WORKERS:
                row = left.pop(0)
                process = FORKS.Process(target=_work, args=(line, writer.stage, row, commit))
                process.start()
                running[process.sentinel] = process, row
            for sentinel in wait(list(running)):
                process, row = running.pop(sentinel)
                process.join()
                if process.exitcode == 1:
                    raise ConnectionError(f"the worker on shard {row['shard']} failed, see above")
                if process.exitcode != 0:
                    left.insert(0, row)
    finally:
        for process, _ in running.values():  # of a job that has failed: Ray ends them with it
            process.kill()
            process.join()
    return {}


def late_workers(counts: Path) -> Iterator[int]:
    """Ids of workers that are still alive."""
    for file in counts.glob("pid-*"):
        pid = int(file.name.removeprefix("pid-"))
        command = Path(f"/proc/{pid}/cmdline")
        with contextlib.suppress(OSError):
            if b"forkserver" in command.read_bytes():
                yield pid
