"""A checkpoint that one of two processes cannot write: both miss it, and both go on."""

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipelines.training.checkpoint import Checkpoints
from pipelines.training.checkpoint_files import attempts, is_complete
from tests.fixtures.ranks import on_ranks
from tests.unit.test_failed_saves import files_up_to


def save_thrice(path: Path) -> dict[str, Any]:
    """The second time, rank 1 has no room; what both ranks were told, and what is resumed from."""
    rank = dist.get_rank()
    told: list[Any] = []
    state = {name: torch.full((5000,), 1.0) for name in "abcd"}  # some are for rank 1 to write
    with Checkpoints(
        path / "checkpoints", keep=2, settings={}, on_failure=lambda *what: told.append(what)
    ) as checkpoints:
        checkpoints.save(2, state, {})
        checkpoints.wait()
        with files_up_to(1000) if rank == 1 else nullcontext():
            checkpoints.save(4, state, {})
            assert checkpoints._thread is not None
            checkpoints._thread.join()
        checkpoints.save(6, state, {})
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, told)
    return {"told": everyone, "step": checkpoints.resume(state).step}


def test_what_one_rank_cannot_write_both_do_without(tmp_path: Path) -> None:
    found = on_ranks(save_thrice, 2, tmp_path, tmp_path)
    (first, second) = found["told"]
    assert first == second
    ((step, text),) = first
    assert step == 6
    assert re.search(r"rank 1: .*(File too large|could not be written)", text)
    assert "would go back to step-00000002" in text
    assert found["step"] == 6
    left = attempts(tmp_path / "checkpoints")
    assert [path.name[:13] for path in left] == ["step-00000006", "step-00000002"]
    assert all(map(is_complete, left))
