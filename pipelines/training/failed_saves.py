"""That a checkpoint could not be saved: how it is found, why, and whether a training goes on."""

from collections.abc import Callable
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from pipelines.training.hashed_files import HashedFiles

IN_A_ROW = 3
"""Failures that end a training: with each, more updates would be lost."""


class WholeWriter(dcp.FileSystemWriter):
    """Writes everything or fails; what it has written is on the disk, and its hash known.

    DCP (torch 2.13) does not look at how its helper threads end: it would save a checkpoint without
    what they had to write.
    """

    def __init__(self, path: Path, threads: int) -> None:
        """As many files as threads, for each rank."""
        super().__init__(path, sync_files=False, thread_count=threads)
        self.files = self.fs = HashedFiles()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            future = super().write_data(plan, planner)
        except RuntimeError as error:
            raise _first(error) from None
        missing = len(plan.items) - len(future.value())
        if missing:
            raise OSError(
                f"{missing} of {len(plan.items)} tensors could not be written; why is on this "
                "process's standard error"
            )
        return future


class FailedSaves:
    """Counts the saves that failed since the newest whole checkpoint; the same on every rank."""

    def __init__(self, on_failure: Callable[[int, str], None]) -> None:
        """`on_failure` is told after which update a training goes on without a checkpoint."""
        self.on_failure = on_failure
        self._newest: str | None = None
        self._count = 0

    def forget(self, newest: str) -> None:
        """There is a whole checkpoint of this name to go back to."""
        self._newest, self._count = newest, 0

    def bear(self, step: int, error: Exception | None) -> None:
        """Raise an error if there is nothing to go back to, or too many in a row; else say it."""
        if error is None:
            return
        self._count += 1
        if self._newest is None or self._count == IN_A_ROW:
            raise error
        self.on_failure(
            step,
            f"A CHECKPOINT COULD NOT BE SAVED: {error}. The training goes on, and would go back to "
            f"{self._newest}; {IN_A_ROW} such failures in a row end it, this is number "
            f"{self._count}",
        )


def reason_of(error: BaseException) -> str:
    """In a line: DCP's own words are its ranks' stacks."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {why}" for rank, (why, _) in error.failures.items())
    return str(error)


def _first(error: BaseException) -> BaseException:
    """What the disk said, if that led to it: torch.save then fails once more, over its own file."""
    first: BaseException | None = error
    while first is not None and not isinstance(first, OSError):
        first = first.__context__
    return first or error
