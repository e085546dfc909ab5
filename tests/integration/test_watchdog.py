"""Two processes that train, of which one hangs or is stopped: both end, and the rank is named."""

import os
import re
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from pipelines.training.watchdog import HUNG, Watchdog, WatchdogConfig
from tests.fixtures.groups import KILLED, join_group, run_group

PATIENCE_S = 3.0


def work(rank: int, world_size: int, path: Path, how: str) -> None:
    """A few barriers, in which rank 0 then waits for rank 1."""
    sys.stderr = (path / f"said-{rank}.txt").open("w")
    join_group(rank, world_size, path / "meeting")
    config = WatchdogConfig(patience_seconds=PATIENCE_S)
    with Watchdog(path / "beats", config, rank=rank, world_size=world_size) as watchdog:
        for step in range(1, 10):
            watchdog.beat(f"the batch of update {step}")
            if rank == 1 and step == 5:
                if how == "hangs":
                    threading.Event().wait()
                elif how == "is stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
            watchdog.beat(f"update {step}")
            dist.barrier()


@pytest.mark.parametrize("how", ["hangs", "is stopped"])
def test_the_rank_that_holds_the_others_up_is_named_and_the_group_ends(
    tmp_path: Path, how: str
) -> None:
    codes = run_group(work, 2, tmp_path, how)
    said = (tmp_path / "said-0.txt").read_text()
    assert codes[0] == HUNG
    assert "WATCHDOG: rank 0 has been in update 5" in said
    if how == "hangs":
        assert codes[1] == HUNG
        assert "rank 1 hangs in the batch of update 5" in said
        stack = (tmp_path / "said-1.txt").read_text()
        assert "test_watchdog.py" in stack  # where it hangs
        assert "in work" in stack
    else:
        assert codes[1] == KILLED  # by whoever started the group
        assert re.search("rank 1 (is stopped or gone: its|has never written a) .*heartbeat", said)


def test_a_training_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    assert run_group(work, 2, tmp_path, "goes on") == [0, 0]
    assert (tmp_path / "said-0.txt").read_text() == ""
