"""What rank 0 of every training does with what its loop hands out."""

import time
from pathlib import Path

from pipelines.training.run_directory import write_result
from pipelines.training.tracking import Tracker


class Desk:
    """Keeps the record of a training; each training's own desk keeps its pictures and its model."""

    def __init__(self, output: Path, tracking_uri: str) -> None:
        self.output = output
        self.tracker = Tracker(output, tracking_uri)
        self.metrics: dict[str, float] = {}
        """The last value of each."""
        self.step, self.started = 0, time.monotonic()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.step = step
        self.metrics |= metrics
        self.tracker.log_metrics(metrics, step)

    def resume(self, step: int, said: list[str]) -> None:
        self.step = step
        self.tracker.rewind(step)
        for line in said:
            self.notice(step, line)

    def notice(self, step: int, text: str) -> None:
        self.tracker.notice(text, step)

    def stop(self) -> None:
        self.notice(self.step, "stopped, as it was asked to, after a checkpoint")

    def keep_result(self, steps: int) -> None:
        """Before the model file, which means "finished"."""
        figures = {name: round(value, 5) for name, value in self.metrics.items()}
        seconds = round(time.monotonic() - self.started, 1)
        write_result(self.output, {"steps": steps, "training_seconds": seconds, **figures})


def ignore(*what: object) -> None:
    """Ranks other than the first keep nothing."""
