"""A job's line in a process of its own, with processes where it would have Ray's workers.

Everything else is the job as it is. A worker that is killed is started again, as Ray does; one
that raises ends the job. Workers of a dead driver go on.
"""

import contextlib
import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from jobs import download_pairs, filter_pairs, shards
from pipelines.data import s3, s3_lease
from pipelines.data.stage import DatasetWriter
from tests.chaos import broken
from tests.chaos.doom import Doom, Steps
from tests.fixtures.forks import forks

VERBS = {"download_pairs": download_pairs, "filter_pairs": filter_pairs}
WORKERS = 2
PATIENCE = {
    "CONNECT_TIMEOUT_S": 1.0,
    "READ_TIMEOUT_S": 1.0,
    "FIRST_PAUSE_S": 0.002,
    "LONGEST_PAUSE_S": 0.05,
}


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
    process = forks().Process(target=_run, args=(line,))
    process.start()
    return process


def late_workers(counts: Path) -> Iterator[int]:
    """Ids of workers that are still alive."""
    for file in counts.glob("pid-*"):
        pid = int(file.name.removeprefix("pid-"))
        command = Path(f"/proc/{pid}/cmdline")
        with contextlib.suppress(OSError):
            if b"forkserver" in command.read_bytes():
                yield pid


def _run(line: Line) -> None:
    _prepare(line)
    nurseries: list[Connection] = []
    while len(nurseries) < WORKERS:  # before there is a thread that a fork would not have
        nurseries.append(_nursery(line, nurseries))
    shards.ray_session = contextlib.nullcontext  # type: ignore[assignment]
    shards.commit_each = partial(_with_processes, nurseries)
    steps = Steps(line.driver).install()
    code = VERBS[line.verb].main(line.arguments)
    _leave(line, steps, "driver", code)


def _leave(line: Line, steps: Steps, name: str, code: int) -> None:
    """End this process at once: nothing of a driver's is cleaned up behind its back."""
    steps.doom = Doom(place="/nowhere")
    (line.counts / name).write_text(str(steps.count))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _prepare(line: Line) -> None:
    os.environ |= line.environment
    descriptor = os.open(line.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for name, value in PATIENCE.items():
        setattr(s3, name, value)
    s3_lease.hold = partial(s3_lease.hold, expires_after_s=line.lease_s)
    if line.wrong:
        broken.WRONG[line.wrong]()


def _nursery(line: Line, others: list[Connection]) -> Connection:
    """Fork a process that forks a worker for every task that is sent, and sends how it ended."""
    ours, theirs = multiprocessing.Pipe()
    if os.fork():
        theirs.close()
        return ours
    for end in (ours, *others):  # so that the death of the driver is the end of the pipes
        end.close()
    with contextlib.suppress(EOFError, OSError):
        while True:
            task = theirs.recv_bytes()
            if (worker := os.fork()) == 0:
                _work(line, *pickle.loads(task))
            theirs.send(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))
    os._exit(0)


def _work(line: Line, stage: str, row: dict[str, Any], commit: Callable[[Any], Any]) -> None:
    (line.counts / f"pid-{os.getpid()}").touch()
    mine = (stage, row["shard"]) == (line.stage, line.shard)
    steps = Steps(line.worker if mine else Doom(place=line.worker.place)).install()
    code = 0
    try:
        commit(row)
    except BaseException:
        traceback.print_exc()
        code = 1
    _leave(line, steps, f"worker-{stage}", code)


def _with_processes(
    nurseries: list[Connection],
    writer: DatasetWriter,
    commit: shards.Commit,
    pending: list[str],
    *,
    cpus: float,
    row_of: shards.RowOf = lambda _: {},
) -> dict[str, float]:
    """In the place of `shards.commit_each`."""
    left = [{"shard": shard, **row_of(shard)} for shard in pending]
    idle, busy = list(nurseries), dict[Connection, dict[str, Any]]()
    while left or busy:
        while left and idle:
            nursery, row = idle.pop(0), left.pop(0)
            nursery.send_bytes(pickle.dumps((writer.stage, row, commit)))
            busy[nursery] = row
        ready = wait(list(busy))
        for nursery in [each for each in busy if each in ready]:
            idle.append(nursery)
            row, code = busy.pop(nursery), nursery.recv()
            if code == 1:
                raise ConnectionError(f"the worker on shard {row['shard']} failed, see above")
            if code != 0:
                left.insert(0, row)
    return {}
