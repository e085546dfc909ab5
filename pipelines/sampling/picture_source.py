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


class Busy(Exception):
    """The queue is full."""

    def __init__(self, retry_after_seconds: float) -> None:
        super().__init__(f"the queue is full; come back in {retry_after_seconds:g} s")
        self.retry_after_seconds = retry_after_seconds


class TooLate(Exception):
    """The pictures were not ready within our own deadline."""


class PictureSource(Protocol):
    """What draws."""

    def draw(
        self, request: ImagesRequest
    ) -> AsyncGenerator[PartialPicture | list[RankedPicture], None]:
        """Partial pictures at `request.partial_images` moments spread over the raster, then once
        the list of `n` pictures, best first.

        Closing the generator (aclose) frees the request's slots within one token step. Raises Busy
        before the first item, TooLate, and NonFiniteLogits.
        """
        ...
