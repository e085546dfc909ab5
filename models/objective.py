"""What a training asks of a stage-one model's objective, be it the dVAE's or the VQ-VAE's.

Letters: B batch, g grid side, S picture side.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.stage_one import StageOne

SumOverRanks = Callable[[Tensor], None]
"""Replaces a tensor, in place, by its sum over all ranks."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What an update minimises, and what is told of it."""

    value: Tensor
    """Scalar to be minimised: mean over the batch, nats per channel of a pixel."""
    per_picture: Tensor
    """(B,) without gradient; not finite for the pictures that spoil `value`."""
    tokens: Tensor
    """The codes of the pictures, (B, g, g) int64."""
    terms: dict[str, Tensor]
    """Scalars by name, means over the batch, without gradient."""


class Objective(Protocol):
    """A model, its loss, and whatever else moves with the updates."""

    @property
    def model(self) -> StageOne: ...

    @property
    def warmup_steps(self) -> int:
        """Updates after which a codebook that is hardly used has collapsed."""

    def loss(self, pixels: Tensor, *, step: int, generator: torch.Generator, report: bool) -> Loss:
        """The loss of (B, 3, S, S) pictures in [0, 1]; with `report`, all terms for the log."""

    def settings(self, step: int) -> dict[str, float]:
        """What is scheduled, by name, but for the step size."""

    def after_update(
        self, *, generator: torch.Generator, sum_over_ranks: SumOverRanks, is_first: bool
    ) -> None:
        """What moves without a gradient; `is_first` on rank 0 alone."""

    def state(self) -> dict[str, Tensor]:
        """Tensors beside the parameters that a resumed training needs; filled in place."""

    def preview(
        self, model: StageOne, pixels: Tensor, *, step: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Pictures through `model` to be looked at, each (B, 3, S, S) in [0, 1], by name."""
