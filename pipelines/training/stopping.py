"""Asking a training to stop: it makes one checkpoint at once, and can go on from there.

Whoever runs the training asks by a file that all ranks can see: Ray's workers run the loop in a
thread, where no signal arrives.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SECONDS_BETWEEN_LOOKS = 1.0


class Stopped(Exception):
    """The training has stopped, as it was asked to, and can go on."""


class StopRequest:
    """A request to stop, for a training in one directory."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / ".stop"
        self._looked = float("-inf")
        self._is_asked = False

    def is_asked(self) -> bool:
        """Whether to stop; looks at the disk once a second at most."""
        if not self._is_asked and time.monotonic() - self._looked > SECONDS_BETWEEN_LOOKS:
            self._looked, self._is_asked = time.monotonic(), self._file.exists()
        return self._is_asked

    def ask(self) -> None:
        self._file.touch()

    def forget(self) -> None:
        self._file.unlink(missing_ok=True)

    @contextmanager
    def on_sigterm(self) -> Iterator[None]:
        """Within it, SIGTERM asks; an older request is forgotten. For a process's main thread."""

        def ask(number: int, frame: FrameType | None) -> None:
            self.ask()

        self.forget()
        before = signal.signal(signal.SIGTERM, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
