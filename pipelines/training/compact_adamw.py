"""AdamW that keeps most of its state in 16 bits a number, and can update one parameter at a time.

The matrices of the resblocks, 98 in 100 of the 12B's parameters, keep their moments in bf16 or in
the paper's formats, and if asked for their fp32 weights as a bf16 weight and the 16 bits that it
lacks. Gains, biases, embeddings and heads keep everything in fp32 (paper, appendix D.2).
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from models.sixteen_bit import join, split
from pipelines.training.adamw_rule import DTYPES, Factors, Rule, State, fused_update, update_
from pipelines.training.parallelize import local

LOWER_BITS = "lower_bits"
PIECE = 1 << 16  # numbers worked on at a time on a CPU: the fp32 temporaries stay in its cache


class CompactAdamW(torch.optim.Optimizer):
    """AdamW over groups of parameters.

    Those of the groups that are marked `compact` have the rule's moments, and with `split_weights`
    become bf16. `update` takes a flag on the device in place of a decision on the host.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], rule: Rule, *, lr: float, split_weights: bool
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "compact": False})
        self._group_of: dict[Tensor, dict[str, Any]] = {}
        self._rules = {True: rule, False: replace(rule, moments="fp32")}
        for group in self.param_groups:
            for parameter in group["params"]:
                self._group_of[parameter] = group
                self._prepare(parameter, group["compact"], split_weights)

    @torch.no_grad()
    def step(self, closure: None = None, *, factor: float = 1.0) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, with `factor` times it.

        A gradient of bf16 is multiplied in fp32, and nothing is written back to it.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                unscale = None
                if factor != 1.0:
                    unscale = torch.full((), factor, device=gradient.device)
                self.update(parameter, gradient, unscale=unscale)

    @torch.no_grad()
    def update(
        self,
        parameter: Tensor,
        gradient: Tensor,
        *,
        unscale: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> None:
        """Update one parameter; see `Factors` for `unscale` and `skip`."""
        kept, group = self.state[parameter], self._group_of[parameter]
        rule = self._rules[group["compact"]]
        kept["step"] += 1 if skip is None else 1 - skip
        state = State(
            weight=_flat(parameter.detach()),
            lower=_flat(kept[LOWER_BITS]) if LOWER_BITS in kept else None,
            mean=_flat(kept["exp_avg"]),
            variance=_flat(kept["exp_avg_sq"]),
            gradient=local(gradient).reshape(-1),
        )
        factors = _factors(kept["step"], group, rule, unscale, skip)
        if state.weight.is_cuda:
            fused_update()(state, factors, rule)
            return
        for piece in state.pieces(PIECE):
            update_(piece, factors, rule)

    def master(self, parameter: Tensor) -> Tensor:
        """A parameter in fp32: itself, or made of its two halves."""
        kept = self.state[parameter]
        if LOWER_BITS not in kept:
            return parameter.detach()
        return join(parameter.detach(), kept[LOWER_BITS])

    def _prepare(self, parameter: nn.Parameter, compact: bool, split_weights: bool) -> None:
        kept = self.state[parameter]
        kept["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        dtype = DTYPES[self._rules[compact].moments]
        # Zero is code zero in both of the paper's formats.
        kept["exp_avg"] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        kept["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        if compact and split_weights:
            parameter.data, kept[LOWER_BITS] = split(parameter.detach())


def _factors(
    step: Tensor, group: dict[str, Any], rule: Rule, unscale: Tensor | None, skip: Tensor | None
) -> Factors:
    """In fp64 until the last: near the first step 1 - beta^step cancels."""
    lr, steps = group["lr"], step.double()
    return Factors(
        decay=torch.full((), 1 - lr * group["weight_decay"], device=step.device),
        rate=(lr / (1 - rule.beta1**steps)).float(),
        correction=(1 - rule.beta2**steps).float(),
        unscale=unscale,
        skip=skip,
    )


def _flat(tensor: Tensor) -> Tensor:
    """A view of a rank's own shard: updates of it are the tensor's."""
    return local(tensor).view(-1)
