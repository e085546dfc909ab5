"""Checkpoints that are whole or not there: what a training resumes from.

The state is copied to the host, which the training waits for, and then written, hashed and
declared whole by a thread. A checkpoint can be read by any number of ranks.
"""

import json
import platform
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.utils._pytree import tree_leaves

from pipelines.data.plan import OutputConflict, difference
from pipelines.data.storage import NoSpace
from pipelines.training import checkpoint_files
from pipelines.training.failed_saves import FailedSaves, WholeWriter, reason_of
from pipelines.training.hashed_files import Written

WRITERS = 2  # files of a rank, and threads that write and hash them
SPARE_BYTES = 16 << 20  # for what is small: progress, names, metadata


class Resumed(NamedTuple):
    """What a training goes on from."""

    step: int
    """Updates that were made; 0 if there was nothing to go on from."""
    progress: dict[str, Any]
    state: dict[str, Any]
    said: list[str]
    """What a person must know."""


class Checkpoints:
    """The checkpoints of one training. Every rank has one, and calls it at the same updates.

    Leaving the context waits for the checkpoint that is being written. The thread speaks to other
    ranks in a group of its own: a collective of the training's group must not meet one of its.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep: int,
        settings: Mapping[str, Any],
        on_failure: Callable[[int, str], None] = lambda step, text: None,
    ) -> None:
        """`keep` at least two; `settings` are JSON: a checkpoint of others is refused.

        `on_failure` is told of a save that has failed, and the training goes on without.
        """
        if keep < 2:
            raise ValueError(
                f"keep_checkpoints must be at least 2, got {keep}: if the newest turns out to be "
                "damaged, the one before it is needed"
            )
        self.root, self.keep, self.settings = root, keep, dict(settings)
        self.blocked_seconds = 0.0
        """That saving has kept the training waiting."""
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._buffers = BlockingAsyncStager(cache_staged_state_dict=True)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._refused: set[str] = set()
        self._failures = FailedSaves(on_failure)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if error is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()  # what it says is less than why the training ends

    def save(self, step: int, state: dict[str, Any], progress: Mapping[str, Any]) -> None:
        """Begin to save `state` (tensors) and `progress` (JSON) after update `step`.

        What went wrong with the checkpoint before, or a disk that is too full now, is told to
        `on_failure`, and raised if there is no older one to go back to or too many have failed.
        """
        started = time.monotonic()
        self._failures.bear(step, self._joined())
        staged = self._staged(state)
        path, problem = self._agree(_attempt, self._begin, step, staged)
        if problem:
            self._failures.bear(step, problem)
            return
        about = {
            "step": step,
            "settings": self.settings,
            "versions": _versions(),
            "progress": dict(progress),
        }
        arguments = (path, staged, _json(about), step)
        # A daemon: a process whose peers have died must be able to end.
        self._thread = threading.Thread(target=self._write, args=arguments, daemon=True)
        self._thread.start()
        self.blocked_seconds += time.monotonic() - started

    @property
    def is_writing(self) -> bool:
        """Whether the last checkpoint is not whole yet."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Until the last checkpoint is whole; raises what went wrong with it."""
        if (error := self._joined()) is not None:
            raise error

    def resume(self, state: dict[str, Any]) -> Resumed:
        """Fill `state` in place from the newest valid checkpoint, if there is one.

        Raises OutputConflict for a checkpoint of other settings, NoSpace if the disk cannot take
        those to come. A save under way is waited for; that it failed is said.
        """
        failed = self._joined()
        path, said = self.newest_valid()
        said = [f"checkpoint refused: {reason}" for reason in said]
        said += [str(failed)] if failed else []
        if problem := self._agree(self._missing_space_for_all, state):
            raise NoSpace(problem)
        if path is None:
            return Resumed(0, {}, state, said)
        about = checkpoint_files.read_progress(path)
        self._check_settings(path, about)
        self._failures.forget(path.name)
        dcp.load(state, checkpoint_id=path, process_group=self._group, no_dist=not self._group)
        if about["versions"] != _versions():
            said.append(
                f"{path.name} was saved under {about['versions']}, and the training goes on under "
                f"{_versions()}: it may not end in the same bits"
            )
        said.append(f"resumed after step {about['step']} from {path.name}")
        return Resumed(about["step"], about["progress"], state, said)

    def newest_valid(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint whose every file is as written, and why newer ones were refused."""
        rejected: list[str] = []
        for path in self._agree(checkpoint_files.attempts, self.root):
            problem = self._problem(path)
            if problem is None:
                return path, rejected
            rejected.append(f"{path.name}: {problem}")
            self._refused.add(path.name)
        return None, rejected

    def _joined(self) -> Exception | None:
        """What went wrong with the last save, once it is over; None if nothing did."""
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        return error

    def _problem(self, path: Path) -> str | None:
        """What is wrong with a checkpoint; every rank reads its share of the files."""
        problem, files = self._agree(checkpoint_files.listed_files, path)
        if problem is not None:
            return str(problem)
        ranks = dist.get_world_size() if self._group else 1
        own = dict(list(files.items())[self._rank :: ranks])
        found = self._gather(checkpoint_files.changed_file(path, own))
        return next((problem for problem in found if problem is not None), None)

    def _check_settings(self, path: Path, about: Mapping[str, Any]) -> None:
        found, wanted = _json(about.get("settings", {})), _json(self.settings)
        if found != wanted:
            raise OutputConflict(
                f"{path} was saved by a training with other settings; nothing was loaded. Choose "
                f"another output, or the settings it has:\n{difference(found, wanted)}"
            )

    def _staged(self, state: dict[str, Any]) -> dict[str, Any]:
        """A copy on the host, in memory that is used again and again."""
        with torch.no_grad():
            if self._buffers.state_dict_cache is None and not torch.cuda.is_available():
                # Memory can be pinned with CUDA only, and the stager would pin it.
                self._buffers.state_dict_cache = BlockingAsyncStager().stage(state)
            return self._buffers.stage(state)

    def _begin(self, step: int, staged: dict[str, Any]) -> Path:
        """A new directory, if there is room for what it will hold."""
        if missing := self._missing_space(_bytes(staged)):
            raise NoSpace(missing)
        path = self.root / checkpoint_files.directory_name(step, uuid.uuid4().hex[:8])
        path.mkdir(parents=True)
        return path

    def _missing_space_for_all(self, state: dict[str, Any]) -> str | None:
        """For the checkpoints that are still to come, beside those that are there."""
        there = sum(map(checkpoint_files.is_complete, checkpoint_files.attempts(self.root)))
        return self._missing_space(_bytes(state) * max(1, self.keep + 1 - there))

    def _missing_space(self, needed: int) -> str | None:
        self.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.root).free
        if free >= needed + SPARE_BYTES:
            return None
        return (
            f"{self.root} must have {needed / 1e9:.3f} GB free for checkpoints ({self.keep} are "
            f"kept, and one more while it is written), it has {free / 1e9:.3f} GB: make room or "
            "lower cadence.keep_checkpoints; the checkpoints that are there are as they were"
        )

    def _write(self, path: Path, staged: dict[str, Any], about: bytes, step: int) -> None:
        try:
            writer = WholeWriter(path, WRITERS)
            group, alone = self._group, not self._group
            dcp.save(staged, storage_writer=writer, process_group=group, no_dist=alone)
            self._complete(path, about, step, writer.files.written)
            self._failures.forget(path.name)
        except (Exception, CheckpointException) as error:  # DCP's is no Exception
            self._error = OSError(f"{path}: {reason_of(error)}")
            if self._rank == 0 and not checkpoint_files.is_complete(path):
                shutil.rmtree(path, ignore_errors=True)  # it may be what fills the disk

    def _complete(self, path: Path, about: bytes, step: int, own: dict[str, Written]) -> None:
        """When every rank's files are on the disk; an error of any rank is raised on all."""
        files: dict[str, Written] = {}
        for written in self._gather(own):
            files |= written

        def declare() -> None:
            files.update(checkpoint_files.write_progress(path, about))
            checkpoint_files.complete(path, step, files)
            checkpoint_files.remove_old(self.root, path, self.keep, self._refused)

        _, problem = self._agree(_attempt, declare)
        if problem:
            raise problem

    def _gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self._group is None:
            return [value]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, value, group=self._group)
        return everyone

    def _agree(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function gives on rank 0, on every rank."""
        box = [function(*arguments) if self._rank == 0 else None]
        if self._group is not None:
            dist.broadcast_object_list(box, src=0, group=self._group, device=torch.device("cpu"))
        return box[0]


def _attempt(function: Callable[..., Any], *arguments: Any) -> tuple[Any, OSError | None]:
    """What a function gives, or why it does not."""
    try:
        return function(*arguments), None
    except OSError as error:
        return None, error


def _json(value: Any) -> bytes:
    """As `canonical_json`, but a setting may be infinite."""
    return json.dumps(value, sort_keys=True, indent=1).encode()


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "python": platform.python_version()}


def _bytes(state: Any) -> int:
    """Of all ranks' tensors, each counted once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tree_leaves(state))
