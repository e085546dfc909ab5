"""Processes of a test, as threads: one runs at a time, from one storage step to the next."""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.chaos.steps import opens_for_writing, step_of

TIMEOUT_S = 60.0

_here = threading.local()
_hooked: list[bool] = []


class Died(BaseException):
    """Unwinds the thread of a killed actor; it passes every `except Exception`."""


class Actor:
    """A body that stands before its next step until `step` lets it do it.

    A killed one does nothing more to files, also in its `finally` blocks. What it had open is
    closed, as the system does for a process; that frees its locks.
    """

    def __init__(self, name: str, root: Path, body: "Callable[[Actor], object]") -> None:
        if not _hooked:
            sys.addaudithook(_hook)
            _hooked.append(True)
        self.name, self.root, self.body = name, str(root), body
        self.ended = False
        self.error: BaseException | None = None
        self._dead = False
        self._open: str | None = None  # being written: no other step has been taken since
        self._may_run, self._stands = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def step(self) -> None:
        """Do the step that it stands before; come back before the next one, or at the end."""
        if not self.ended:
            self._may_run.release()
            assert self._stands.acquire(timeout=TIMEOUT_S), f"{self.name} waits for another"

    def kill(self, *, cut: float = 1.0) -> None:
        """End it before its next step; of a file that it was writing only a part is there."""
        self._dead = True
        if not self.ended and self._open is not None and cut < 1.0:
            size = os.stat(self._open).st_size
            os.truncate(self._open, int(size * cut))
        self.step()
        self._thread.join(TIMEOUT_S)
        assert self.ended

    def pause(self) -> None:
        """For a body: a step without a file, such as waiting for others."""
        self._stands.release()
        self._may_run.acquire()
        if self._dead:
            raise Died

    def _run(self) -> None:
        self._may_run.acquire()
        _here.actor = self
        try:
            if not self._dead:
                self.body(self)
        except Died:
            pass
        except BaseException as error:
            self.error = error
        self.ended = True
        self._stands.release()

    def _before(self, event: str, arguments: tuple[Any, ...]) -> None:
        path = step_of(event, arguments, self.root)
        if path is None:
            return
        if self._dead:
            raise Died
        self.pause()
        self._open = path if opens_for_writing(event, arguments) else None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    actor = getattr(_here, "actor", None)
    if actor is not None:
        actor._before(event, arguments)
