"""Per-resblock gradient scaling (paper, section 2.4 and appendix D.1).

The norms of activation gradients fall from block to block by more than fp16's exponent can span, so
that one loss scale for the whole model underflows at one end or overflows at the other. Here every
resblock has a scale of its own: the gradient that arrives on the fp32 residual stream is multiplied
by it, runs through the 16-bit branch, is cleared of what is not finite, divided by it, and added to
the stream. Parameters' gradients come out multiplied by their block's scale too; `ResblockScales`
checks them, divides them and moves the scales. None of it asks the device for a number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ResblockScalingConfig:
    """How the scales move. The defaults are the paper's (appendix D.1).

    The paper starts at M · 2^13 and stays in M · [2^7, 2^24] with M data-parallel replicas, because
    its loss is divided by the overall batch. Ours is the mean over a replica's batch, and the
    replicas' mean is taken by the reduction: M cancels. What remains of M is the number of micro
    batches, by which a replica does divide its loss (`ResblockScales`, `parts`).
    """

    initial: float = 2.0**13
    lowest: float = 2.0**7
    highest: float = 2.0**24
    growth: float = 2 ** (1 / 1000)
    """Factor after a step whose gradients of the block are all finite."""
    backoff: float = 2**-0.5
    """Factor after a step in which one is not."""
    patience: int = 125
    """Updates in which a scale is divided at most once."""

    def __post_init__(self) -> None:
        if not 0 < self.lowest <= self.initial <= self.highest:
            raise ValueError(
                "scales must satisfy 0 < lowest <= initial <= highest, "
                f"got {self.lowest}, {self.initial}, {self.highest}"
            )


class ResblockScales:
    """The scale of every resblock, in `values` (K,) fp32, and the rule that moves them.

    `parts` is the number by which a replica's loss is divided before its backward pass: the scales
    and their limits are multiplied by it.
    """

    def __init__(
        self,
        n_resblocks: int,
        config: ResblockScalingConfig,
        device: torch.device,
        parts: int = 1,
    ) -> None:
        self.config, self.parts = config, parts
        self.values = torch.full((n_resblocks,), config.initial * parts, device=device)
        # Updates since a scale was divided last; "long ago" at the start.
        self.rested = torch.full((n_resblocks,), config.patience, device=device)

    def unscale_(self, gradients: Sequence[Sequence[Tensor]]) -> Tensor:
        """Divide every block's gradients by its scale; (K,) fp32, 1.0 where one is not finite.

        `gradients` holds each block's gradients (a rank's own shards). The paper skips the whole
        update if any flag is set on any rank: the caller does, and moves the scales by the flags of
        all.
        """
        flags = torch.zeros_like(self.values)
        inverse = self.values.reciprocal()
        for block, tensors in enumerate(gradients):
            # The operator takes one dtype at a time.
            for dtype in {tensor.dtype for tensor in tensors}:
                torch._amp_foreach_non_finite_check_and_unscale_(
                    [tensor for tensor in tensors if tensor.dtype == dtype],
                    flags[block : block + 1],
                    inverse[block],
                )
        return flags

    def move(self, overflowed: Tensor) -> None:
        """Grow, divide or keep every scale after an update, by whether its block overflowed."""
        config = self.config
        divide = overflowed & (self.rested >= config.patience)
        factor = torch.where(divide, config.backoff, torch.where(overflowed, 1.0, config.growth))
        self.values.mul_(factor).clamp_(config.lowest * self.parts, config.highest * self.parts)
        # A scale divided in update n may be divided again in update n + patience.
        self.rested.masked_fill_(divide, 0).add_(1)

    def state_dict(self) -> dict[str, Tensor]:
        return {"values": self.values, "rested": self.rested}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        # In place: the resblocks hold views of `values`.
        self.values.copy_(state["values"])
        self.rested.copy_(state["rested"])


class ScaleGradient(torch.autograd.Function):
    """The end of a branch: identity forwards; backwards the gradient times the block's scale."""

    @staticmethod
    def forward(ctx: Any, branch: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.dtype = branch.dtype
        return branch.float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return (gradient * scale).to(ctx.dtype), None


class UnscaleGradient(torch.autograd.Function):
    """The start of a branch: identity forwards; backwards drop what is not finite, then unscale.

    Without the filter one overflowing block would make all blocks before it overflow too, and drag
    their scales down with its own (paper, section 2.4).
    """

    @staticmethod
    def forward(ctx: Any, stream: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return stream.view_as(stream)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return torch.nan_to_num(gradient.float(), 0.0, 0.0, 0.0).div_(scale), None
