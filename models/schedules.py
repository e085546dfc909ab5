"""How a number moves over the steps of a training."""

import math
from dataclasses import dataclass
from typing import Any


def cosine(step: int, *, start: float, end: float, steps: int) -> float:
    """From `start` at step 0 to `end` at `steps` along half a cosine, constant after."""
    if steps <= 0:
        return end
    progress = min(step / steps, 1.0)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def linear_warmup(step: int, steps: int) -> float:
    """Factor of the step size: 1/steps at step 0, 1 from step `steps` - 1 on."""
    return min((step + 1) / steps, 1.0) if steps > 0 else 1.0


@dataclass(frozen=True, kw_only=True)
class PlateauConfig:
    """When the training loss counts as no longer falling.

    The paper halves the step size on plateaus, five times in all, and does not say how it told one
    (appendix B.2); window and threshold are ours.
    """

    window: int = 5000
    """Updates whose mean loss is compared with that of the window before."""
    threshold: float = 1e-3
    """Relative fall of the mean below which a window is a plateau."""
    halvings: int = 5
    """Halvings at most (paper, appendix B.2: 4.5e-4 ends at 1.4e-5)."""


class PlateauHalving:
    """The factor 1, 1/2, 1/4 … of the step size, by the losses it was told."""

    def __init__(self, config: PlateauConfig) -> None:
        self.config = config
        self.halvings = 0
        self._sum, self._count = 0.0, 0
        self._last_mean: float | None = None

    @property
    def factor(self) -> float:
        return float(0.5**self.halvings)

    def update(self, loss: float) -> None:
        """Take the loss of one more update in."""
        self._sum += loss
        self._count += 1
        if self._count < self.config.window:
            return
        mean = self._sum / self._count
        last = self._last_mean
        plateau = last is not None and last - mean < self.config.threshold * last
        if plateau and self.halvings < self.config.halvings:
            self.halvings += 1
        self._last_mean, self._sum, self._count = mean, 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "halvings": self.halvings,
            "sum": self._sum,
            "count": self._count,
            "last_mean": self._last_mean,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.halvings = int(state["halvings"])
        self._sum, self._count = float(state["sum"]), int(state["count"])
        self._last_mean = state["last_mean"]
