"""A worker that is late holds the others up at the end of the backward pass, and only there."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from pipelines.training import late_collectives
from pipelines.training.prior_training import ShardingConfig
from tests.fixtures.ranks import on_ranks
from tests.fixtures.tiny_training import tiny_training, train_tiny

UPDATES = 3
LATE_BY = 0.03  # seconds, at each reduction; longer than an update of the others takes in all


@dataclass
class Watch:
    """Counts the reductions that were begun and not waited for."""

    begun: int = 0
    under_way: int = 0
    most: int = 0

    def over(self, reduce: Callable[..., Any]) -> Callable[..., "Watched"]:
        def watched(*tensors: Any, **how: Any) -> Watched:
            if dist.get_rank() == 1:
                time.sleep(LATE_BY)
            self.begun += 1
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            return Watched(reduce(*tensors, **how), self)

        return watched


@dataclass
class Watched:
    work: dist.Work
    watch: Watch

    def wait(self) -> None:
        self.work.wait()
        self.watch.under_way -= 1


def _train(keep_gathered: bool) -> dict[str, Any]:
    sharding = ShardingConfig(group_size=2, keep_gathered=keep_gathered)
    watch = Watch()
    watched = watch.over(late_collectives.reduce_scatter)
    with patch.object(late_collectives, "reduce_scatter", watched):
        trained = train_tiny(tiny_training(sharding=sharding), UPDATES, batches=UPDATES)
    return trained | {"watch": watch}


@pytest.mark.parametrize("keep_gathered", [True, False])
def test_late_gradients_are_whole_before_they_are_used(keep_gathered: bool, tmp_path: Path) -> None:
    two = on_ranks(_train, 2, tmp_path, keep_gathered)
    one = train_tiny(tiny_training(), UPDATES, batches=UPDATES)
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-5, atol=0)
    torch.testing.assert_close(two["norms"], one["norms"], rtol=1e-4, atol=0)
    # Memory for all of them was granted with the weights', or else for two.
    watch: Watch = two["watch"]
    assert watch.begun > 4 * UPDATES
    assert watch.most == (watch.begun // UPDATES if keep_gathered else 2)
    assert watch.under_way == 0
