"""A process that kills itself before the k-th step that others could see; it dies once.

On disk, a step is what `steps.py` says; in S3, it is each part of a request that is sent: its head,
then its body. Only the main thread's steps count, because they are the same in every run.
"""

import json
import os
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.chaos.steps import opens_for_writing, step_of

NEVER = 10**9


@dataclass(frozen=True, kw_only=True)
class Doom:
    """Who dies, and when."""

    place: str
    """Directory below which steps count, or `:PORT` of the S3 server."""
    beside: str = ""
    """A directory below it whose steps do not count."""
    at: int = NEVER
    """Before which step, from 1 on."""
    cut: float = 1.0
    """What is left of a local file that was being written."""
    grave: str = ""
    """File that is made at the death; nobody dies if it is there."""
    waits: bool = False
    """Stand still there, for somebody else to take the whole node."""


class Steps:
    """Counts the steps of this process, and ends it before one of them."""

    def __init__(self, doom: Doom) -> None:
        self.doom = doom
        self.count = 0
        self.last = ""
        self._writing: str | None = None
        self._deaf = False

    def install(self) -> "Steps":
        """For the rest of the process' life: a hook cannot be removed."""
        sys.addaudithook(self.hear)
        return self

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._deaf or not (what := self._step(event, arguments)):
            return
        if threading.current_thread() is not threading.main_thread():
            return
        self.count += 1
        self.last = f"{event} {what}"
        if self.count == self.doom.at:
            self._deaf = True
            self.die()
        self._writing = what if opens_for_writing(event, arguments) else None

    def _step(self, event: str, arguments: tuple[Any, ...]) -> str:
        place = self.doom.place
        if not place.startswith(":"):
            path = step_of(event, arguments, place) or ""
            beside = self.doom.beside and path.startswith(f"{self.doom.beside}/")
            return "" if beside else path
        if event != "http.client.send" or f":{arguments[0].port}" != place:
            return ""
        return bytes(arguments[1][:60]).decode(errors="replace").split("\r\n")[0]

    def die(self) -> None:
        try:
            descriptor = os.open(self.doom.grave, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            self._deaf = False
            return
        # Where the last file ends that was opened for writing: an undisturbed death is at its end.
        if self._writing is not None and self.doom.cut < 1:
            os.truncate(self._writing, int(os.stat(self._writing).st_size * self.doom.cut))
        said = {"pid": os.getpid(), "parent": os.getppid(), "before": self.last}
        os.write(descriptor, json.dumps(said).encode())
        os.close(descriptor)
        if self.doom.waits:
            threading.Event().wait()
        os.kill(os.getpid(), signal.SIGKILL)


def write_doom(file: Path, doom: Doom) -> None:
    """For `StepsOfWorkers`."""
    half = file.with_suffix(".half")
    half.write_text(json.dumps(asdict(doom)))
    half.replace(file)


class StepsOfWorkers(Steps):
    """As `Steps` for a worker of Ray, which serves many jobs: the file says who dies next.

    Every job's grave is another file; a worker counts its steps of one job.
    """

    def __init__(self, file: Path) -> None:
        super().__init__(Doom(place=f"{file.parent}"))
        self.file, self._root = file, str(file.parent)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._deaf or not step_of(event, arguments, self._root):
            return
        if not sys.argv[0].endswith("default_worker.py"):
            return
        self._deaf = True
        try:
            told = Doom(**json.loads(self.file.read_text()))
        except FileNotFoundError:
            return
        finally:
            self._deaf = False
        if told != self.doom:
            self.doom, self.count, self._writing = told, 0, None
        super().hear(event, arguments)
