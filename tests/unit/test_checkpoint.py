"""Checkpoints: killed at every file operation, damaged in every file, and never loaded in part."""

import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.data.plan import OutputConflict
from pipelines.training import checkpoint
from pipelines.training.checkpoint import Checkpoints
from pipelines.training.checkpoint_files import COMPLETE, attempts, is_complete
from tests.fixtures.forks import forks

SETTINGS = {"prior": {"n_layers": 2}}
WRITES = {"os.mkdir", "os.link", "os.rename", "os.remove", "os.rmdir"}
FILES = ("__0_0.distcp", "__0_1.distcp", ".metadata", "progress.json", COMPLETE)
DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "cut": lambda file, rng: os.truncate(file, rng.randrange(file.stat().st_size)),
    "emptied": lambda file, rng: os.truncate(file, 0),
    "deleted": lambda file, rng: file.unlink(),
    "flipped": lambda file, rng: flip(file, rng),
}


def flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def state_of(step: int) -> dict[str, Any]:
    """A function of the step: tensors of several kinds, nested as a trainer's are."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"w": torch.randn(40, 30, generator=generator)},
        "moments": {"w": {"exp_avg": torch.randn(40, 30, generator=generator).half()}},
        "steps": {"w": torch.tensor(float(step))},
    }


def of(root: Path, settings: dict[str, Any] = SETTINGS) -> Checkpoints:
    return Checkpoints(root, keep=2, settings=settings)


def save(root: Path, *steps: int) -> None:
    with of(root) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_of(step), {"skipped": step})


def check_resumes(root: Path, *, at: tuple[int, ...]) -> list[str]:
    """That a training goes on from one of these steps, whole; what it says."""
    found = of(root).resume(state_of(0))
    assert found.step in at, found.said
    assert found.progress == {"skipped": found.step}
    for kind, wanted in state_of(found.step).items():
        assert same(found.state[kind], wanted), kind
    return found.said


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    return all(same(left[key], value) for key, value in right.items())


def _save_and_die(root: Path, at: int) -> None:
    """Save another one; killed before the file operation of this number."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        is_open = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
        if (event in WRITES or is_open) and "step-" in str(arguments[0]):
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    sys.addaudithook(hook)
    save(root, 6)


def die_at(root: Path, operation: int) -> bool:
    """Whether the process was killed; False if it has fewer operations."""
    process = forks().Process(target=_save_and_die, args=(root, operation))
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def test_a_process_killed_at_any_file_operation_costs_one_interval_at_most(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    save(whole, 2, 4)
    killed = 0
    while True:
        root = tmp_path / str(killed)
        shutil.copytree(whole, root)
        if not die_at(root, killed + 1):
            break
        check_resumes(root, at=(4, 6))
        save(root, 8)
        assert [is_complete(path) for path in attempts(root)] == [True, True]
        check_resumes(root, at=(8,))
        killed += 1
    # A directory, two shards, metadata, progress and COMPLETE at least, and the old one's end.
    assert killed >= 12
    check_resumes(root, at=(6,))
    assert [path.name[:13] for path in attempts(root)] == ["step-00000006", "step-00000004"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_refuses_its_checkpoint_by_name(
    tmp_path: Path, file: str, damage: str
) -> None:
    save(tmp_path, 2, 4)
    newest = attempts(tmp_path)[0]
    assert {path.name for path in newest.iterdir()} == set(FILES)
    before = (newest / file).read_bytes()
    DAMAGES[damage](newest / file, random.Random(0))
    said = check_resumes(tmp_path, at=(2,))
    assert newest.name in said[0]
    # A flipped bit of COMPLETE may name a file that never was.
    assert file in said[0] or file == COMPLETE
    assert not (newest / file).exists() or (newest / file).read_bytes() != before


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(200))
def test_a_flipped_bit_anywhere_refuses_the_checkpoint(tmp_path: Path, seed: int) -> None:
    save(tmp_path, 2, 4)
    rng = random.Random(seed)
    flip(attempts(tmp_path)[0] / rng.choice(FILES), rng)
    check_resumes(tmp_path, at=(2,))


def test_what_was_refused_counts_for_nothing_and_is_removed(tmp_path: Path) -> None:
    save(tmp_path, 2, 4)
    damaged = attempts(tmp_path)[0]
    flip(damaged / FILES[0], random.Random(0))
    with of(tmp_path) as checkpoints:
        assert checkpoints.resume(state_of(0)).step == 2
        checkpoints.save(4, state_of(4), {"skipped": 4})
    assert damaged not in attempts(tmp_path)
    assert [path.name[:13] for path in attempts(tmp_path)] == ["step-00000004", "step-00000002"]
    check_resumes(tmp_path, at=(4,))


def test_a_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it changes meanwhile is not in the checkpoint."""
    may_write, real = threading.Event(), checkpoint.dcp.save

    def slow(*arguments: Any, **named: Any) -> Any:
        assert may_write.wait(60)
        return real(*arguments, **named)

    monkeypatch.setattr(checkpoint.dcp, "save", slow)
    with of(tmp_path) as checkpoints:
        state = state_of(4)
        checkpoints.save(4, state, {"skipped": 4})
        state["model"]["w"].zero_()
        assert not any(map(is_complete, attempts(tmp_path)))
        may_write.set()
        checkpoints.wait()
        check_resumes(tmp_path, at=(4,))
        buffer = checkpoints._staged(state)["model"]["w"].data_ptr()
        assert checkpoints._staged(state)["model"]["w"].data_ptr() == buffer


def test_a_disk_that_is_too_full_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 2)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    before = sorted(tmp_path.rglob("*"))
    for act in (lambda c: c.save(4, state_of(4), {}), lambda c: c.resume(state_of(0))):
        with pytest.raises(OSError, match=r"must have 0\.\d+ GB free .* lower cadence"):
            act(of(tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_of_other_settings_is_refused_by_a_diff(tmp_path: Path) -> None:
    save(tmp_path, 2)
    untouched = state_of(0)
    with pytest.raises(OutputConflict, match=r'-\s+"n_layers": 2\n\+\s+"n_layers": 3'):
        of(tmp_path, {"prior": {"n_layers": 3}}).resume(untouched)
    assert same(untouched, state_of(0))


def test_another_version_of_torch_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 2)
    monkeypatch.setattr(checkpoint, "_versions", lambda: {"torch": "3.0", "python": "3.12"})
    assert "may not end in the same bits" in check_resumes(tmp_path, at=(2,))[0]


def test_a_single_checkpoint_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_checkpoints must be at least 2, got 1"):
        Checkpoints(tmp_path, keep=1, settings={})
