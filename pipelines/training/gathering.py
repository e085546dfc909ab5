"""Rows of all ranks on every rank, with the gradients on their way back."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.clip import Gather, own_batch


def gather_of(rank: int, world_size: int) -> Gather:
    """The rows (B, F) of all ranks, in their order: (world · B, F)."""
    return partial(_gather, rank, world_size) if world_size > 1 else own_batch


def _gather(rank: int, world_size: int, rows: Tensor) -> Tensor:
    everyone: Tensor = _GatherRows.apply(rows, rank, world_size)
    return everyone


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, rank: int, world_size: int) -> Tensor:
        ctx.own = slice(rank * len(rows), (rank + 1) * len(rows))
        parts = [torch.empty_like(rows) for _ in range(world_size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # Every rank's loss depends on these rows.
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[ctx.own], None, None
