"""Entries that wait on disk until someone who may be away for a while has taken them.

Whoever writes them never waits. A `Courier`, one an outbox, delivers them in the order in which
they were written, and one that was not taken is tried again until it is.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

FULL = 100_000  # entries; those of ten weeks of an entry a minute
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0  # between attempts while nobody answers
LOOK_S = 0.5
PARTING_S = 60.0  # to deliver what is left at the end, to someone who answers


class Outbox:
    """A directory of entries; any number of processes may add to it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def add(self, entry: Mapping[str, Any], attachment: bytes = b"") -> None:
        """Never waits for anybody but the disk. A full outbox takes nothing more."""
        self.directory.mkdir(parents=True, exist_ok=True)
        name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        if len(os.listdir(self.directory)) >= FULL:
            return
        if attachment:
            (self.directory / f"{name}.attached").write_bytes(attachment)
        temporary = self.directory / f".{name}"
        temporary.write_text(json.dumps(dict(entry)))
        temporary.replace(self.directory / f"{name}.json")

    def entries(self) -> list[Path]:
        return sorted(self.directory.glob("*.json"))


class Refused(Exception):
    """An entry that will never be taken."""


class Courier:
    """Delivers an outbox from a thread, while its context lasts."""

    def __init__(
        self,
        outbox: Outbox,
        deliver: Callable[[dict[str, Any], bytes, bool], None],
        *,
        away: tuple[type[Exception], ...],
        say: Callable[[Exception | None], None],
    ) -> None:
        """`deliver` takes an entry, its attachment, and whether it may have been taken before.

        It raises one of `away` if it is to be tried again, Refused if never. `say` is told of an
        error when it is the first in a row, and None when somebody answers again.
        """
        self.outbox, self._deliver, self._away, self._say = outbox, deliver, away, say
        self._is_away = False
        self._closing = threading.Event()
        # A daemon: a request without an answer must not keep the process.
        self._thread = threading.Thread(target=self._run, name="courier", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._closing.set()
        self._thread.join(PARTING_S)

    def _run(self) -> None:
        wait = FIRST_WAIT_S
        while True:
            is_last = self._closing.is_set()  # before the look, so that it misses nothing
            if self._deliver_all():
                wait = FIRST_WAIT_S
                if is_last:
                    return
                self._closing.wait(LOOK_S)
            elif is_last:
                return
            else:
                self._closing.wait(wait)
                wait = min(2 * wait, LONGEST_WAIT_S)

    def _deliver_all(self) -> bool:
        """Whether somebody took all that was there."""
        for file in self.outbox.entries():
            try:
                self._deliver_one(file)
            except self._away as error:
                if not self._is_away:
                    self._is_away = True
                    self._say(error)
                return False
            if self._is_away:
                self._is_away = False
                self._say(None)
        return True

    def _deliver_one(self, file: Path) -> None:
        attached, tried = file.with_suffix(".attached"), file.with_suffix(".tried")
        attachment = attached.read_bytes() if attached.exists() else b""
        was_tried = tried.exists()
        tried.touch()  # if the answer is lost, nobody knows whether it was taken
        try:
            self._deliver(json.loads(file.read_bytes()), attachment, was_tried)
        except Refused as error:
            self._say(error)
        file.unlink()
        for beside in (attached, tried):
            beside.unlink(missing_ok=True)
