"""Losses that jump, and the batches that are left out of a training because of them."""

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SIGMA = 1.4826  # median absolute deviations in the deviation of a normal distribution


@dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    """What is a spike, and what is done about it. The paper is silent.

    PaLM (Chowdhery et al., 2022, section 5.1) went back by some 100 updates and left 200 to 500
    batches out, those around the spike; the data itself was not bad.
    """

    window: int = 128
    """Finite losses, the last ones, that a loss is compared with; before there are as many, none is
    a spike."""
    deviations: float = 10.0
    """A spike lies above the window's median by so many deviations (of its median absolute one)."""
    least_rise: float = 0.05
    """And by this share of the median at least, however quiet the window is."""
    patience: int = 3
    """Spikes in a row before something is done: a single one does no harm."""
    rewind: bool = False
    """Go back to the newest checkpoint and leave out the batches around the spike; else only say
    it."""
    skip_before: int = 100
    """Batches that are left out before the first spike, and"""
    skip_after: int = 100
    """behind the last."""
    most_rewinds: int = 10
    """After these a training that spikes again goes on without going back."""

    def __post_init__(self) -> None:
        if self.window < 8 or self.patience < 1 or self.deviations <= 0:
            raise ValueError(
                "window must be at least 8, patience at least 1 and deviations above 0, "
                f"got {self.window}, {self.patience}, {self.deviations}"
            )
        if self.least_rise < 0 or min(self.skip_before, self.skip_after, self.most_rewinds) < 0:
            raise ValueError(
                "least_rise, skip_before, skip_after and most_rewinds must be 0 or more"
            )


class SpikeDetector:
    """Looks at every loss; all ranks see the same losses, and so decide the same."""

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self.losses: list[float] = []
        self.in_a_row = 0
        """Spikes up to now."""
        self.rewinds = 0

    def look(self, loss: float) -> bool:
        """Whether this loss, of the update just made, is the last spike that is waited for."""
        config = self.config
        if not loss > self.limit:  # a loss that is not a number is the finite gate's affair
            self.in_a_row = 0
            if loss < float("inf"):
                self.losses = [*self.losses, loss][-config.window :]
            return False
        self.in_a_row += 1
        if self.in_a_row > max(config.window // 4, config.patience):
            self.losses, self.in_a_row = [], 0  # not a spike but a new level
        return self.in_a_row == config.patience

    @property
    def limit(self) -> float:
        """The loss above which is a spike."""
        if len(self.losses) < self.config.window:
            return float("inf")
        median = statistics.median(self.losses)
        deviation = SIGMA * statistics.median(abs(loss - median) for loss in self.losses)
        return median + max(
            self.config.deviations * deviation, self.config.least_rise * abs(median)
        )

    @property
    def may_rewind(self) -> bool:
        return self.config.rewind and self.rewinds < self.config.most_rewinds

    @property
    def may_be_followed_by_rewind(self) -> bool:
        """Whether spikes have begun: a checkpoint of now would hold their beginning."""
        return self.may_rewind and 0 < self.in_a_row <= self.config.patience

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "in_a_row": self.in_a_row, "rewinds": self.rewinds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses = list(state["losses"])
        self.in_a_row, self.rewinds = state["in_a_row"], state["rewinds"]


@dataclass
class DataPosition:
    """The number of the next batch, which is that of the update unless batches are left out."""

    next: int = 0
    left_out: list[tuple[int, int]] = field(default_factory=list)
    """Ranges of batches, (first, past the last)."""

    def __iter__(self) -> Iterator[int]:
        """Without end; what is loaded or left out meanwhile counts from then on."""
        while True:
            yield self.take()

    def take(self) -> int:
        """The number of the batch to learn from now."""
        for first, past in sorted(self.left_out):
            if first <= self.next < past:
                self.next = past
        self.next += 1
        return self.next - 1

    def leave_out(self, first: int, past: int) -> None:
        self.left_out.append((max(first, 0), past))

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.next = state["next"]
        self.left_out = [(first, past) for first, past in state["left_out"]]
