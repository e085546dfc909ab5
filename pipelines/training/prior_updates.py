"""From the gradients of a prior to its update: scales, norms, clipping, the optimizer."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from models.prior import Prior
from models.resblock_scaling import ResblockScales
from pipelines.training.backward_updates import BackwardUpdates
from pipelines.training.block_history import BlockRecord
from pipelines.training.compact_adamw import CompactAdamW
from pipelines.training.gradient_norms import (
    BlockGradients,
    clip_factor,
    parameter_blocks,
    squared_norms,
)
from pipelines.training.parallelize import attach_scales, local, mean_over_ranks, resblock_gradients
from pipelines.training.prior_training import PriorOptimizerConfig


class Measured(NamedTuple):
    """A backward pass, as the host knows it; the same on all ranks."""

    finite: bool
    """Whether all gradients are."""
    norm: float
    """Of all gradients, before clipping."""
    losses: tuple[float, float, float]
    """(total, text, image), means over the ranks."""
    stop: bool
    """Whether any rank was asked to stop."""


class PriorUpdates:
    """Used once an update: `start`, the backward pass, `measure`, and `apply` if all is well.

    Every rank does the same; the host waits for the device once, in `measure`.
    """

    def __init__(
        self,
        prior: Prior,
        optimizer: torch.optim.Optimizer,
        scales: ResblockScales,
        config: PriorOptimizerConfig,
        *,
        scaled: bool,
    ) -> None:
        self.prior, self.optimizer, self.scales, self.config = prior, optimizer, scales, config
        self.scaled = scaled
        if scaled:
            attach_scales(prior, scales)
        self.blocks = parameter_blocks(prior)
        self._inside: BackwardUpdates | None = None
        if config.step == "in_backward":
            assert isinstance(optimizer, CompactAdamW)
            self._inside = BackwardUpdates(prior, optimizer, scales if scaled else None)
        self._overflows = torch.zeros_like(scales.values)
        self._norms = torch.zeros_like(scales.values)

    def start(self, lr: float) -> None:
        """Before the backward pass, in which updates may happen."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def measure(self, losses: Tensor, *, stop: bool) -> Measured:
        """Unscale the gradients, move the scales; `losses` are this rank's three, on the device.

        `stop` is for all ranks to know at once: it travels with the norms, not for itself.
        """
        found = self._check()
        asked = losses.new_full((1,), float(stop))
        # One message: one for each would wait for the slowest rank every time.
        parts = (found.squares, found.overflowed, losses, asked)
        squares, overflowed, means, asked = mean_over_ranks(torch.cat(parts)).split(
            [len(part) for part in parts]
        )
        norms, flags = squares.sqrt(), overflowed > 0
        self._norms = norms[:-1]
        self._overflows += flags[:-1]
        if self.scaled:
            self.scales.move(flags[:-1])
        any_overflowed, norm, *losses_and_stop = torch.cat(
            (flags.any(0, True), norms.norm()[None], means, asked)
        ).tolist()
        total, text, image, stop_share = losses_and_stop
        finite = not any_overflowed and math.isfinite(norm)
        return Measured(finite, norm, (total, text, image), stop_share > 0)

    def apply(self, measured: Measured) -> None:
        """Clip and update, unless the backward pass has."""
        if self._inside is not None:
            return
        factor = clip_factor(measured.norm, self.config.clip_norm)
        if isinstance(self.optimizer, CompactAdamW):
            self.optimizer.step(factor=factor)
            return
        if factor != 1.0:
            gradients = [local(p.grad) for p in self.prior.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, factor)
        self.optimizer.step()

    def record(self, step: int) -> BlockRecord:
        """The resblocks' scales, overflows since the last record, and last gradients' norms."""
        values = torch.stack((self.scales.values.log2(), self._overflows, self._norms))
        scales, overflows, norms = values.cpu().numpy()
        self._overflows.zero_()
        return BlockRecord(step, scales, overflows, norms)

    def _check(self) -> BlockGradients:
        if self._inside is not None:
            return self._inside.finish()
        overflowed = torch.zeros(len(self.blocks), device=self.scales.values.device)
        if self.scaled:
            overflowed[:-1] = self.scales.unscale_(resblock_gradients(self.prior))
        return BlockGradients(overflowed, squared_norms(self.blocks))
