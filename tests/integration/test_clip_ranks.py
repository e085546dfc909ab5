"""The reranker trained by two gloo processes: as by one, and stopped, killed and resumed."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipelines.training.clip_trainer import ClipTrainer
from tests.fixtures.ranks import KILLED, on_two_that_may_die
from tests.unit.test_clip_training import (
    CONFIG,
    CPU,
    Killed,
    check_resumed,
    pairs,
    run,
    same,
    stage_one,
    training,
)


def run_rank(rank: int, path: Path, kill_at: int, meeting: Path) -> None:
    """One of two spawned processes; leaves what it was told in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    kept = first_update(rank, 2)
    if kill_at:  # stopped before that, by the second rank's wish, and gone on with
        stopped = run(path, stop_at=2, rank=rank, world_size=2)
        assert stopped["weights"] is None
        assert list(stopped["log"]) == [1, 2, 3]
    try:
        told = run(path, kill_at=kill_at, rank=rank, world_size=2)
    except Killed:
        os._exit(KILLED)
    kept |= {key: told[key] for key in ("log", "resumed", "weights")}
    torch.save(kept, path / f"{rank}.pt")


def first_update(rank: int, world_size: int) -> dict[str, Any]:
    """The ranks' mean loss of the first update and the gradient that they took."""
    trainer = ClipTrainer(
        CONFIG,
        training(clip_norm=0.0, redrawn=0.5),
        device=CPU,
        rank=rank,
        world_size=world_size,
        stage_one=stage_one(),
    )
    update = trainer.update(pairs(0, rank, world_size))
    return {
        "row": trainer.metrics(update, 0),
        "gradients": trainer.replica.gradients[:-2].clone(),
    }


def test_two_processes_learn_from_one_batch_and_end_in_the_same_bits(tmp_path: Path) -> None:
    whole = on_two_that_may_die(run_rank, tmp_path / "whole")
    alone = first_update(0, 1)
    for rank in whole:
        for name in ("loss", "batch_accuracy"):
            assert abs(rank["row"][name] - alone["row"][name]) < 1e-6
        scale = float(alone["gradients"].abs().max())
        torch.testing.assert_close(
            rank["gradients"], alone["gradients"], atol=1e-6 * scale, rtol=1e-4
        )
    on_two_that_may_die(run_rank, tmp_path / "killed", kill_at=5)
    resumed = on_two_that_may_die(run_rank, tmp_path / "killed")
    for one, other in zip(whole, resumed, strict=True):
        check_resumed(one, other)
    assert same(whole[0]["weights"], whole[1]["weights"])
