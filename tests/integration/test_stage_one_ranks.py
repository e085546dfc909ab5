"""Stage one trained by two gloo processes, killed and resumed."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.unit.test_stage_one_training import Killed, check_resumed, run, same

KINDS = ("dvae", "vqvae")
KILLED = 9


def run_rank(rank: int, path: Path, kill_at: int, meeting: Path) -> None:
    """One of two spawned processes, which trains both kinds; leaves what it was told in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    told = {}
    for kind in KINDS:
        try:
            told[kind] = run(path / kind, kind, kill_at=kill_at, rank=rank, world_size=2)
        except Killed:
            if kind == KINDS[-1]:
                os._exit(KILLED)
    kept = ("log", "resumed", "weights")
    torch.save({kind: {key: told[kind][key] for key in kept} for kind in told}, path / f"{rank}.pt")


def spawn(path: Path, kill_at: int = 0) -> list[dict[str, Any]]:
    """What each of two processes was told; empty if they were to end without a word."""
    path.mkdir(exist_ok=True)
    arguments = (path, kill_at, path / f"meeting-{kill_at}")
    context = mp.start_processes(run_rank, arguments, nprocs=2, join=False, start_method="spawn")
    for process in context.processes:
        process.join(120)
    codes = [process.exitcode for process in context.processes]
    assert codes == ([KILLED, KILLED] if kill_at else [0, 0])
    if kill_at:
        return []
    return [torch.load(path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_killed_and_resumed_processes_end_in_the_same_bits(tmp_path: Path) -> None:
    whole = spawn(tmp_path / "whole")
    spawn(tmp_path / "killed", kill_at=5)
    resumed = spawn(tmp_path / "killed")
    for kind in KINDS:
        for one, other in zip(whole, resumed, strict=True):
            check_resumed(one[kind], other[kind])
        assert same(whole[0][kind]["weights"], whole[1][kind]["weights"])
