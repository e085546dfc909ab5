"""Where the HTTP app's pictures come from: one sampler here, or replicas elsewhere.

Letters: H and W the picture's sides.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipelines.sampling.api import ImagesRequest
from pipelines.sampling.engine import Sample


@dataclass(frozen=True)
class PartialPicture:
    """A picture while it is drawn: its upper rows, the rest grey."""

    index: int
    """Which of the request's pictures, 0 … n - 1."""
    rows: int
    """Rows of the grid that are drawn."""
    pixels: np.ndarray  # (H, W, 3) uint8


@dataclass(frozen=True)
class RankedPicture:
    """A finished picture, and what the reranker thinks of it."""

    sample: Sample
    score: float | None
    """How well it fits the prompt; None where nothing was ranked."""


Item = PartialPicture | list[RankedPicture]


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


class Busy(Exception):
    """The queue is full."""

    def __init__(self, retry_after_seconds: float) -> None:
        super().__init__(f"the queue is full; come back in {retry_after_seconds:g} s")
        self.retry_after_seconds = retry_after_seconds


class TooLate(Exception):
    """The pictures were not ready within our own deadline."""


class PictureSource(Protocol):
    """What draws."""

    def check_room(self) -> None:
        """Raises Busy if there is none for any request; costs next to nothing."""
        ...

    def draw(
        self, request: ImagesRequest
    ) -> AsyncGenerator[PartialPicture | list[RankedPicture], None]:
        """Partial pictures at `request.partial_images` moments spread over the raster, then once
        the list of `n` pictures, best first.

        Closing the generator (aclose) frees the request's slots within one token step. Raises Busy
        before the first item, TooLate, and NonFiniteLogits.
        """
        ...


class Scorer(Protocol):
    """What ranks: a reranker."""

    def scores(self, prompt: str, pictures: np.ndarray) -> np.ndarray:
        """How well pictures (N, H, W, 3) uint8 fit a prompt, float32 (N,)."""
        ...
