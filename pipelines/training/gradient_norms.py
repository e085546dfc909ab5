"""Norms of gradients by resblock, over all ranks, without asking the device for a number."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.prior import Prior
from pipelines.training.parallelize import local


class BlockGradients(NamedTuple):
    """What one backward pass left, on the device: K resblocks, and last all that is outside."""

    overflowed: Tensor
    """(K + 1,) fp32: 1.0 where a gradient is not finite on this rank."""
    squares: Tensor
    """(K + 1,) fp32: squared norms, whose mean over the ranks is that of the whole gradients."""


def parameter_blocks(prior: Prior) -> list[list[nn.Parameter]]:
    """The parameters of every resblock, and last those outside."""
    blocks = [list(resblock.parameters()) for resblock in prior.resblocks]
    inside = {id(parameter) for block in blocks for parameter in block}
    return [*blocks, [p for p in prior.parameters() if id(p) not in inside]]


def squared_norms(blocks: Sequence[Sequence[nn.Parameter]]) -> Tensor:
    """(blocks,) fp32: see `BlockGradients.squares`; reads every gradient once."""
    with_gradients = [[p for p in block if p.grad is not None] for block in blocks]
    parameters = [parameter for block in with_gradients for parameter in block]
    if not parameters:
        raise ValueError("a backward pass must have left gradients, there are none")
    gradients = [local(parameter.grad) for parameter in parameters]  # type: ignore[arg-type]
    norms = torch.stack(torch._foreach_norm(gradients, 2, torch.float32))
    shards = torch.tensor([n_shards(p) for p in parameters], dtype=torch.float32)
    squares = norms.square() * shards.to(norms.device, non_blocking=True)
    parts = squares.split([len(block) for block in with_gradients])
    return torch.stack([part.sum() for part in parts])


def clip_factor(norm: float, largest: float) -> float:
    """What gradients of a global norm are multiplied by so that it is at most `largest`, if any."""
    return 1.0 if not largest or norm <= largest else largest / (norm + 1e-6)


def n_shards(parameter: Tensor) -> int:
    """Parts that a parameter is cut into; the ranks beyond that many hold copies."""
    if not isinstance(parameter, DTensor):
        return 1
    shards = 1
    for dimension, placement in enumerate(parameter.placements):
        if placement.is_shard():
            shards *= parameter.device_mesh.size(dimension)
    return shards
