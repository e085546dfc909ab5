"""Updates inside the backward pass: a resblock's gradients live until it has all of them.

What differs from an update after the backward pass, and from the paper:

- A resblock with a gradient that is not finite keeps its weights and moments, and its scale is
  divided; the other blocks are updated. The paper then skips the update of all.
- Gradients are not clipped by their global norm, which is known only at the end.
- Gradients are not accumulated over micro batches.

The flags stay on the device: the host waits for nothing.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from models.prior import Prior
from models.resblock_scaling import ResblockScales
from pipelines.training.compact_adamw import CompactAdamW
from pipelines.training.gradient_norms import BlockGradients, parameter_blocks


class BackwardUpdates:
    """Hooks that update a prior of one process while its gradients are made.

    With `scales` the gradients of a resblock come multiplied by its scale. Parameters outside of
    resblocks are updated one by one.
    """

    def __init__(
        self, prior: Prior, optimizer: CompactAdamW, scales: ResblockScales | None
    ) -> None:
        self.optimizer, self.scales = optimizer, scales
        *resblocks, outside = parameter_blocks(prior)
        self.n_resblocks = len(resblocks)
        self.units = [*resblocks, *([parameter] for parameter in outside)]
        self._missing: list[int] = []
        device = next(prior.parameters()).device
        self._overflowed = torch.zeros(len(self.units), device=device)
        self._squares = torch.zeros(len(self.units), device=device)
        for unit, parameters in enumerate(self.units):
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(self._arrived(unit))
        self._start()

    def finish(self) -> BlockGradients:
        """After the backward pass: what was found, by resblock."""
        if late := [unit for unit, missing in enumerate(self._missing) if missing]:
            raise RuntimeError(
                f"every parameter must have a gradient to be updated, units {late} lack some; "
                "set optimizer.step to after"
            )
        inside = slice(0, self.n_resblocks)
        outside = slice(self.n_resblocks, None)
        found = BlockGradients(
            torch.cat((self._overflowed[inside], self._overflowed[outside].amax(0, keepdim=True))),
            torch.cat((self._squares[inside], self._squares[outside].sum(0, keepdim=True))),
        )
        self._start()
        return found

    def _start(self) -> None:
        self._missing = [len(parameters) for parameters in self.units]

    def _arrived(self, unit: int) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            self._missing[unit] -= 1
            if not self._missing[unit]:
                self._update(unit, self.units[unit])

        return hook

    @torch.no_grad()
    def _update(self, unit: int, parameters: Sequence[nn.Parameter]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients, 2, torch.float32))
        unscale = None
        if self.scales is not None and unit < self.n_resblocks:
            unscale = self.scales.values[unit].reciprocal()
            norms = norms * unscale
        square = norms.square().sum()
        # A norm of fp32 numbers is finite if they are, unless they are above 1e19.
        skip = (~torch.isfinite(square)).float()
        self._squares[unit], self._overflowed[unit] = square, skip
        for parameter, gradient in zip(parameters, gradients, strict=True):
            self.optimizer.update(parameter, gradient, unscale=unscale, skip=skip)
            parameter.grad = None
