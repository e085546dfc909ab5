"""Ending a training that hangs, with the name of the rank that holds the others up.

Every rank says what it is about to do; a thread of each writes that to a file, and looks. Ranks
that wait for each other are all inside the same thing, so that whoever has come least far, or
writes no more, is the one. Every rank prints where its threads stand and ends its process: only
a new process gets out of a collective, and whoever started the group starts it anew.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from pipelines.data.storage import replace_file

HUNG = 70  # the exit code: sysexits.h, an internal error
LOOKS = 8  # in the patience


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """When a training counts as hanging."""

    patience_seconds: float = 1200.0
    """Longer than anything takes that a rank does in one go: an update, compiling the first one,
    a look at held-out rows, the pictures that rank 0 draws. 0: never."""

    def __post_init__(self) -> None:
        if self.patience_seconds < 0:
            raise ValueError(
                f"watchdog.patience_seconds must be 0 or more, got {self.patience_seconds}"
            )


class Beat(NamedTuple):
    """How far a rank is."""

    begun: int
    """Things begun since the start of the group: equal for ranks that do the same."""
    doing: str
    written: float
    """When its file was written, by the clock of the file system, which all ranks share."""


class Watchdog:
    """One a rank. Starts to look with the first beat, ends with its context."""

    def __init__(self, directory: Path, config: WatchdogConfig, *, rank: int, world_size: int):
        """`directory` is shared by the ranks; what an older group left in it is forgotten."""
        self.directory, self.patience = directory, config.patience_seconds
        self.rank, self.world_size = rank, world_size
        self._count, self._doing, self._since = 0, "", time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._file(self.rank).unlink(missing_ok=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def beat(self, doing: str) -> None:
        """To be told before everything that may hang; the same by every rank, in the same order."""
        self._count, self._doing, self._since = self._count + 1, doing, time.monotonic()
        if self.patience and self._count == 1:
            self._thread.start()

    def _watch(self) -> None:
        is_over = False
        while not is_over:
            try:
                self._write()
                if time.monotonic() - self._since > self.patience:
                    self._end()
            except OSError as error:  # a file system that is away for a moment is not a hang
                print(f"watchdog: {error}", file=sys.stderr, flush=True)
            is_over = self._over.wait(self.patience / LOOKS)

    def _write(self) -> None:
        beat = {"begun": self._count, "doing": self._doing}
        replace_file(self._file(self.rank), json.dumps(beat).encode())

    def _end(self) -> None:
        print(self._report(), file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        os._exit(HUNG)

    def _report(self) -> str:
        beats = {rank: self._read(rank) for rank in range(self.world_size)}
        own = beats[self.rank]
        assert own is not None  # just written
        named = []
        # Others must have written as lately as the looks are apart, with room for a busy machine.
        oldest = own.written - self.patience / 2
        for rank, beat in beats.items():
            if beat is None:
                named.append(f"rank {rank} has never written a heartbeat")
            elif beat.written < oldest:
                named.append(
                    f"rank {rank} is stopped or gone: its last heartbeat, before {beat.doing}, is "
                    f"{own.written - beat.written:.0f} s old"
                )
        if not named:
            least = min(beat.begun for beat in beats.values() if beat)
            if least < max(beat.begun for beat in beats.values() if beat):
                behind = (
                    (rank, beat) for rank, beat in beats.items() if beat and beat.begun == least
                )
                named = [f"rank {rank} hangs in {beat.doing}" for rank, beat in behind]
        return (
            f"WATCHDOG: rank {self.rank} has been in {own.doing} for more than {self.patience:g} s "
            f"(watchdog.patience_seconds); {'; '.join(named) or f'so are all {self.world_size}'}. "
            "Every rank prints its stacks and ends; the training goes on from its last checkpoint"
        )

    def _read(self, rank: int) -> Beat | None:
        file = self._file(rank)
        try:
            written = file.stat().st_mtime
            return Beat(**json.loads(file.read_bytes()), written=written)
        except FileNotFoundError:
            return None

    def _file(self, rank: int) -> Path:
        return self.directory / f"rank-{rank}.json"
