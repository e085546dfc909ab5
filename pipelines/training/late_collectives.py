"""On a CPU: collectives that nobody waits for before their result is used.

On a GPU they run on streams of their own. On a CPU, FSDP2 (torch 2.13) ends each before it goes on:
twice a resblock and more, every worker waits for the one that is behind just then.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable
from torch.distributed.fsdp import FSDPModule

# Its name from torch 2.13 on, and the one before.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather_late(units: Sequence[FSDPModule]) -> None:
    """Let weights that were asked for before their turn come meanwhile."""
    for unit in units:
        unit._set_unshard_async_op(True)


def reduce_late(units: Sequence[FSDPModule], at_most: int) -> None:
    """Let gradients be reduced beside the backward pass; they are when it returns.

    `at_most` units are under way at a time, whose whole gradients are in memory. For units in fp32
    that are sharded over one group, and for gradients without hooks: FSDP must do nothing with a
    reduced gradient, neither cast it nor reduce it between groups nor show it to a hook. Nor may
    there be gradients from a backward pass before, to which it would add.
    """
    reductions = _LateReductions(at_most)
    for unit in units:
        unit.set_custom_reduce_scatter(reductions)  # type: ignore[arg-type]


class _LateReductions:
    """FSDP's reduce-scatter."""

    def __init__(self, at_most: int) -> None:
        self._at_most = at_most
        self._under_way = deque[tuple[dist.Work, Tensor]]()

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        # Each time: some may still be there of a backward pass that failed.
        Variable._execution_engine.queue_callback(self._finish)
        self._wait_until(self._at_most - 1)
        work = reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=True)
        assert work is not None
        self._under_way.append((work, input_tensor))  # which FSDP would let go of

    def _finish(self) -> None:
        self._wait_until(0)

    def _wait_until(self, left: int) -> None:
        """The first of them, until no more than those are under way."""
        while len(self._under_way) > left:
            work, _ = self._under_way.popleft()
            work.wait()
