"""Exponentially weighted averages of a model's iterates: the weights that are sampled from."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AveragingConfig:
    """The prior's values (paper, appendix B.2); the dVAE averages every update with 0.999 (A.2)."""

    decay: float = 0.99
    every: int = 25
    """Updates between two additions to the average."""
    keep_on: Literal["device", "host"] = "device"
    """Where the average lies. The paper keeps it on the host, as 12B on one GPU must."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")


class IterateAverage:
    """The average of a model's parameters (a rank's own shards of them), by parameter name."""

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], config: AveragingConfig) -> None:
        self.config = config
        self.shadow = {name: self._placed(value).clone() for name, value in parameters}

    @torch.no_grad()
    def update(self, parameters: Iterable[tuple[str, Tensor]], step: int) -> None:
        """Take the parameters after update number `step` (1, 2, …) in, if it is one to take."""
        if step % self.config.every:
            return
        # An average of n iterates should weigh them alike while n is small: without this the
        # random initial weights would fill the average for 1 / (1 - decay) additions.
        taken = step // self.config.every
        decay = min(self.config.decay, taken / (taken + 9))
        # One at a time: of split weights the fp32 ones exist only here.
        for name, value in parameters:
            self.shadow[name].lerp_(self._placed(value), 1 - decay)

    def _placed(self, value: Tensor) -> Tensor:
        return value.detach() if self.config.keep_on == "device" else value.detach().cpu()

    def state_dict(self) -> dict[str, Tensor]:
        return self.shadow

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            self.shadow[name].copy_(value)
