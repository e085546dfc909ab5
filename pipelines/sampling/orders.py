"""What a batch is asked for, and what it tells.

Letters: T text slots of a prompt, n image tokens that are given.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pipelines.sampling.drawing import SamplingConfig
from pipelines.sampling.row_caches import Prefix


@dataclass(frozen=True)
class Drawn:
    """A picture of an order, or its upper rows."""

    index: int
    """Which of the order's seeds."""
    rows: int
    """Rows of the grid that are drawn."""
    tokens: np.ndarray  # int64 (rows · grid,)


Tell = Callable[[Drawn | Exception], None]


@dataclass(eq=False, kw_only=True)
class Order:
    """Pictures of one prompt, and who is to be told."""

    text_tokens: Tensor  # int64 (T,)
    seeds: Sequence[int]
    sampling: SamplingConfig
    """Its precision is not looked at: a batch has one."""
    tell: Tell
    """Called in the thread that steps: with every whole picture, and at the end with an error if
    there was one."""
    primed: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # (n,)
    moments: frozenset[int] = frozenset()
    """Rows of the grid after which the first `shown` pictures are told of."""
    shown: int = 0
    deadline: float = float("inf")
    """On time.monotonic's clock."""

    begun: int = field(default=0, init=False)
    left: int = field(default=0, init=False)
    slots: int = field(default=0, init=False)
    prefixes: list[Prefix] = field(default_factory=list, init=False)

    @property
    def slots_a_picture(self) -> int:
        """Two with guidance: the prompt's and the empty caption's."""
        return 2 if self.sampling.guided else 1
