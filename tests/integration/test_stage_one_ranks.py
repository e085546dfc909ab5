"""Stage one trained by two gloo processes, stopped, killed and resumed."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from tests.fixtures.ranks import KILLED, on_two_that_may_die
from tests.unit.test_stage_one_training import Killed, check_resumed, run, same

KINDS = ("dvae", "vqvae")


def run_rank(rank: int, path: Path, kill_at: int, meeting: Path) -> None:
    """One of two spawned processes, which trains both kinds; leaves what it was told in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    told = {}
    for kind in KINDS:
        if kill_at:  # stopped before that, by the second rank's wish, and gone on with
            stopped = run(path / kind, kind, stop_at=2, rank=rank, world_size=2)
            assert stopped["weights"] is None
            assert list(stopped["log"]) == [1, 2, 3]
        try:
            told[kind] = run(path / kind, kind, kill_at=kill_at, rank=rank, world_size=2)
        except Killed:
            if kind == KINDS[-1]:
                os._exit(KILLED)
    kept = ("log", "resumed", "weights")
    torch.save({kind: {key: told[kind][key] for key in kept} for kind in told}, path / f"{rank}.pt")


def test_two_stopped_killed_and_resumed_processes_end_in_the_same_bits(tmp_path: Path) -> None:
    whole = on_two_that_may_die(run_rank, tmp_path / "whole")
    on_two_that_may_die(run_rank, tmp_path / "killed", kill_at=5)
    resumed = on_two_that_may_die(run_rank, tmp_path / "killed")
    for kind in KINDS:
        for one, other in zip(whole, resumed, strict=True):
            check_resumed(one[kind], other[kind])
        assert same(whole[0][kind]["weights"], whole[1][kind]["weights"])
