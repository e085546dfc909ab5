"""Progress that suits who looks: a bar on a terminal, a line every half minute in a log."""

import json
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

SECONDS_BETWEEN_LINES = 30.0
SECONDS_BETWEEN_LOOKS = 0.5


class Progress:
    """Counts towards a total, as a context manager."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done, self.note = 0, ""
        self._started = self._last_line = time.monotonic()
        self._bar = _bar() if sys.stdout.isatty() else None
        self._task: TaskID | None = None

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, note="")
        return self

    def advance(self, count: int = 1) -> None:
        self.set(self.done + count)

    def set(self, done: int, note: str = "") -> None:
        """Say how far it is, with a few words behind it (a loss, a rate)."""
        self.done, self.note = done, note
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, note=note)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._print()

    def say(self, text: str) -> None:
        """Words of their own, above the bar or between the lines."""
        if self._bar is not None:
            self._bar.console.print(f"{self.label}: {text}", markup=False, highlight=False)
        else:
            print(f"{self.label}: {text}", flush=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif error is None:
            self._print()

    def _print(self) -> None:
        seconds = time.monotonic() - self._started
        line = f"{self.label}: {self.done}/{self.total} {self.unit}, {seconds:.0f} s"
        print(f"{line}, {self.note}" if self.note else line, flush=True)


class FollowMetrics:
    """Shows a training's progress from the metrics file that its rank 0 writes."""

    def __init__(self, metrics: Path, label: str, total: int, keys: tuple[str, ...]) -> None:
        self._metrics, self._keys = metrics, keys
        self._progress = Progress(label, total, "steps")
        # A resumed training writes the file anew: what was said before is not said again.
        self._said = set(metrics.read_text().splitlines(True)) if metrics.exists() else set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "FollowMetrics":
        self._progress.__enter__()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._progress.__exit__(kind, error, trace)

    def _follow(self) -> None:
        offset = 0
        while True:
            ending = self._stop.wait(SECONDS_BETWEEN_LOOKS)
            if self._metrics.exists():
                with self._metrics.open() as file:
                    if self._metrics.stat().st_size < offset:  # a resumed training rewound it
                        offset = 0
                    file.seek(offset)
                    lines = file.readlines()
                    # A line that is still being written has no end yet: look again at it.
                    whole = [line for line in lines if line.endswith("\n")]
                    offset += sum(len(line.encode()) for line in whole)
                self._tell(whole)
            if ending:
                return

    def _tell(self, lines: list[str]) -> None:
        """Say each notice once, show the latest metrics."""
        rows = [(line, json.loads(line)) for line in lines]
        for line, row in rows:
            if "notice" in row and line not in self._said:
                self._said.add(line)
                self._progress.say(row["notice"])
        if metrics := [row for _, row in rows if any(key in row for key in self._keys)]:
            self._show(metrics[-1])

    def _show(self, row: dict[str, float]) -> None:
        note = ", ".join(f"{key} {row[key]:.3f}" for key in self._keys if key in row)
        self._progress.set(int(row["step"]), note)


def _bar() -> RichProgress:
    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
