"""Checkpoints that cannot be saved: they are missed, said and, for a while, done without."""

import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pipelines.training.checkpoint import Checkpoints
from pipelines.training.checkpoint_files import attempts, is_complete
from tests.unit.test_checkpoint import SETTINGS, check_resumes, of, save, state_of

# Its helper threads say on stderr how they end.
NOISY = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The system refuses this process to write files larger than that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fail_to_save(checkpoints: Checkpoints, step: int) -> None:
    with files_up_to(1000):
        checkpoints.save(step, state_of(step), {"skipped": step})
        assert checkpoints._thread is not None
        checkpoints._thread.join()


@NOISY
def test_a_training_goes_on_without_checkpoints_that_cannot_be_written(tmp_path: Path) -> None:
    told: list[tuple[int, str]] = []
    save(tmp_path, 2)
    checkpoints = Checkpoints(
        tmp_path, keep=2, settings=SETTINGS, on_failure=lambda *what: told.append(what)
    )
    checkpoints.resume(state_of(0))
    for step in (4, 6):
        fail_to_save(checkpoints, step)
    checkpoints.save(8, state_of(8), {"skipped": 8})
    assert [step for step, _ in told] == [6, 8]
    for number, (_, text) in enumerate(told, start=1):
        assert re.search(
            rf"File too large.* go back to step-00000002.* number {number}$", text, re.DOTALL
        )
    checkpoints.wait()
    check_resumes(tmp_path, at=(8,))
    # What was begun in vain has left nothing, and the count begins anew.
    assert [is_complete(path) for path in attempts(tmp_path)] == [True, True]
    for step in (10, 12, 14):
        fail_to_save(checkpoints, step)
    with pytest.raises(OSError, match="File too large"):
        checkpoints.save(16, state_of(16), {})
    assert len(told) == 4
    check_resumes(tmp_path, at=(8,))


@NOISY
def test_a_file_that_only_a_helper_of_dcp_cannot_write_is_missed(tmp_path: Path) -> None:
    save(tmp_path, 2)
    checkpoints = of(tmp_path)
    state = {"large": torch.zeros(2000), "small": torch.zeros(2)}  # a file each, by their size
    with files_up_to(4000):
        checkpoints.save(4, state, {})
        with pytest.raises(OSError, match=r"1 of 2 tensors could not be written|File too large"):
            checkpoints.wait()
    check_resumes(tmp_path, at=(2,))


@NOISY
def test_a_first_checkpoint_that_cannot_be_written_ends_the_training(tmp_path: Path) -> None:
    checkpoints = of(tmp_path)
    fail_to_save(checkpoints, 2)
    with pytest.raises(OSError, match=r"rank 0: .*File too large"):
        checkpoints.save(4, state_of(4), {})
    assert attempts(tmp_path) == []


@NOISY
def test_the_last_checkpoint_of_a_training_must_be_whole(tmp_path: Path) -> None:
    """Whoever asked it to stop would be told that there is one."""
    save(tmp_path, 2)
    checkpoints = of(tmp_path)
    checkpoints.resume(state_of(0))
    fail_to_save(checkpoints, 4)
    with pytest.raises(OSError, match="File too large"):
        checkpoints.__exit__(None, None, None)
    check_resumes(tmp_path, at=(2,))


def test_a_full_disk_is_borne_as_any_failure_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    save(tmp_path, 2)
    checkpoints = Checkpoints(
        tmp_path, keep=2, settings=SETTINGS, on_failure=lambda step, text: told.append(text)
    )
    checkpoints.resume(state_of(0))
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
        checkpoints.save(4, state_of(4), {"skipped": 4})
    assert "lower cadence.keep_checkpoints" in told[0]
    checkpoints.save(6, state_of(6), {"skipped": 6})
    checkpoints.wait()
    check_resumes(tmp_path, at=(6,))
