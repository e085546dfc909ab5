"""What sources of pictures have in common: their limits, and how pictures are shown half drawn.

Letters: B pictures, N of them to be ranked, K image tokens, H and W the picture's sides.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from pipelines.sampling.engine import Sampler
from pipelines.sampling.picture_source import PartialPicture, RankedPicture

GREY = 128

Item = PartialPicture | list[RankedPicture]


class Scorer(Protocol):
    """What ranks: a reranker."""

    def scores(self, prompt: str, pictures: np.ndarray) -> np.ndarray:
        """How well pictures (N, H, W, 3) uint8 fit a prompt, float32 (N,)."""
        ...


@dataclass(frozen=True, kw_only=True)
class ServingLimits:
    """What one sampler takes on."""

    deadline_seconds: float = 120.0
    """From a request's arrival to its pictures; no header of a client changes it."""
    max_waiting: int = 8
    """Requests that may wait while one is sampled; a further one gets 429."""
    retry_after_seconds: int = 2
    """What a client that got 429 is told to wait."""

    def __post_init__(self) -> None:
        if self.deadline_seconds <= 0:
            raise ValueError(f"deadline_seconds must be positive, got {self.deadline_seconds}")
        if self.max_waiting < 0 or self.retry_after_seconds < 0:
            raise ValueError(
                "max_waiting and retry_after_seconds must be 0 or more, "
                f"got {self.max_waiting}, {self.retry_after_seconds}"
            )


def moments(given: int, grid: int, count: int) -> list[int]:
    """Rows after which pictures are shown: `count` equal steps from the `given` ones to the end."""
    steps = (given + (grid - given) * step // (count + 1) for step in range(1, count + 1))
    return sorted({rows for rows in steps if given < rows < grid})


def partial_pixels(sampler: Sampler, tokens: Tensor, rows: int) -> np.ndarray:
    """Pictures (B, H, W, 3) uint8 of the first rows of tokens (B, K); the rest is grey.

    The decoder looks a few rows ahead: it is shown the last row again.
    """
    grid = sampler.prior.config.grid
    raster = tokens.view(-1, grid, grid).clone()
    raster[:, rows:] = raster[:, rows - 1 : rows]
    pixels = sampler.decode(raster.flatten(1))
    pixels[:, rows * sampler.image_size // grid :] = GREY
    return pixels
