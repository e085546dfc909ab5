"""One AdamW update of flat tensors whose state may take 16 bits a number.

The update is computed in fp32 from what the state decodes to, and rounded once, when it is stored.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from models.sixteen_bit import MEAN, VARIANCE, join, split

Moments = Literal["fp32", "bf16", "paper"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "paper": torch.int16}
LARGEST_VARIANCE = 5.0  # of the paper's format (appendix B.2)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """AdamW's numbers that never change."""

    beta1: float
    beta2: float
    epsilon: float
    moments: Moments


class State(NamedTuple):
    """A parameter, or a piece of it, flat."""

    weight: Tensor
    """fp32, or bf16 beside `lower`."""
    lower: Tensor | None
    """int16: the bits that the weight lacks to fp32."""
    mean: Tensor
    """In the dtype of the moments, as the variance."""
    variance: Tensor
    gradient: Tensor
    """fp32 or bf16."""

    def pieces(self, size: int) -> Iterator["State"]:
        """Views of `size` numbers each."""
        for start in range(0, self.weight.numel(), size):
            part = slice(start, start + size)
            yield State(*(None if tensor is None else tensor[part] for tensor in self))  # type: ignore[arg-type]


class Factors(NamedTuple):
    """The numbers of one update: 0-d on the parameter's device, fp32."""

    decay: Tensor
    """What the weight is multiplied by: 1 - lr · weight decay."""
    rate: Tensor
    """lr / (1 - beta1^step)."""
    correction: Tensor
    """1 - beta2^step."""
    unscale: Tensor | None
    """What the gradient is multiplied by first."""
    skip: Tensor | None
    """1.0: leave every bit as it is; 0.0: update."""


def update_(state: State, factors: Factors, rule: Rule) -> None:
    """AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101), in place.

    Plain torch, on any device; with fp32 moments it is `torch.optim.AdamW` to rounding.
    """
    weight = state.weight if state.lower is None else join(state.weight, state.lower)
    mean, variance = _decoded(state, rule)
    gradient = state.gradient.float()
    if factors.unscale is not None:
        gradient = gradient * factors.unscale
    new_mean = torch.lerp(mean, gradient, 1 - rule.beta1)
    new_variance = variance * rule.beta2 + gradient * gradient * (1 - rule.beta2)
    if rule.moments == "paper":
        new_variance = new_variance.clamp(max=LARGEST_VARIANCE)
    root = (new_variance / factors.correction).sqrt() + rule.epsilon
    new_weight = weight * factors.decay - new_mean / root * factors.rate
    if factors.skip is not None:
        stays = factors.skip > 0
        new_mean = torch.where(stays, mean, new_mean)
        new_variance = torch.where(stays, variance, new_variance)
        new_weight = torch.where(stays, weight, new_weight)
    _store(state, rule, new_weight, new_mean, new_variance)


@functools.cache
def fused_update() -> Callable[[State, Factors, Rule], Any]:
    """`update_` as one kernel, which reads and writes each number once.

    On CUDA torch.compile makes it a Triton kernel (not measured). For all sizes there is one.
    """
    return torch.compile(update_, fullgraph=True, dynamic=True)


def _decoded(state: State, rule: Rule) -> tuple[Tensor, Tensor]:
    if rule.moments == "paper":
        return MEAN.decode(state.mean), VARIANCE.decode(state.variance)
    return state.mean.float(), state.variance.float()


def _store(state: State, rule: Rule, weight: Tensor, mean: Tensor, variance: Tensor) -> None:
    if rule.moments == "paper":
        mean, variance = MEAN.encode(mean), VARIANCE.encode(variance)
    state.mean.copy_(mean)
    state.variance.copy_(variance)
    if state.lower is None:
        state.weight.copy_(weight)
        return
    upper, lower = split(weight)
    state.weight.copy_(upper)
    state.lower.copy_(lower)
