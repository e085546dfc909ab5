"""A request's candidates, as one sampler is given them: what goes to a replica and what comes back.

Letters: H and W the picture's sides, n image tokens that are given.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from pipelines.sampling.api import ImagesRequest
from pipelines.sampling.batch_thread import Load
from pipelines.sampling.codec import Codec
from pipelines.sampling.drawing import SamplingConfig, candidate_seed
from pipelines.sampling.engine import Sample
from pipelines.sampling.orders import Drawn, Order, Tell
from pipelines.sampling.partial_pictures import moments, partial_pixels
from pipelines.sampling.picture_source import PartialPicture


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some candidates of a request."""

    prompt: str
    indices: tuple[int, ...]
    """Which of the request's candidates, ascending."""
    seed: int
    """The request's; a candidate's is this and its index."""
    sampling: SamplingConfig
    start: np.ndarray | None  # int64 (n,)
    partial_images: int
    shown: int
    """Candidates below this index are shown while they are drawn."""
    seconds: float
    """Until the request's deadline, from when the piece is taken on: clocks differ."""


@dataclass(frozen=True)
class FinishedPicture:
    """One candidate."""

    index: int
    sample: Sample


PieceItem = PartialPicture | FinishedPicture


def piece_of(request: ImagesRequest, indices: tuple[int, ...], seconds: float) -> Piece:
    """These candidates of a request."""
    return Piece(
        prompt=request.prompt,
        indices=indices,
        seed=request.seed,
        sampling=request.sampling,
        start=request.start,
        partial_images=request.partial_images,
        shown=request.n,
        seconds=seconds,
    )


class BatchHost(Protocol):
    """What steps a batch: a thread of this process, or a process."""

    error: Exception | None
    """What ended it though nobody closed it."""

    def add(self, order: Order) -> None: ...

    def drop(self, order: Order) -> None: ...

    def load(self) -> Load: ...

    def close(self) -> None: ...


class PieceSampler:
    """Draws pieces in one batch, and makes pictures of its tokens in a thread beside it.

    Each picture is decoded alone, so that its pixels do not depend on its neighbours either.
    """

    def __init__(self, codec: Codec, batch: BatchHost) -> None:
        """The batch is closed with it."""
        self.codec, self._batch = codec, batch
        self._decoding = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decoder")
        self.cancelled = 0
        """Pieces whose caller left before they were done."""

    def load(self) -> Load:
        """How the batch is doing."""
        return self._batch.load()

    def check(self) -> None:
        """Raises RuntimeError once a step has failed for a reason that no request has."""
        if self._batch.error is not None:
            raise RuntimeError("a step of the batch failed") from self._batch.error

    def close(self) -> None:
        """End the threads; what is being drawn is forgotten."""
        self._batch.close()
        self._decoding.shutdown(cancel_futures=True)

    async def draw(self, piece: Piece) -> AsyncGenerator[PieceItem, None]:
        """A piece's pictures as they are done, and partial ones before.

        Closing the generator frees its slots before the next step. Raises TooLate and
        NonFiniteLogits.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Drawn | Exception]()
        order = self._order(
            piece, lambda event: _tell(loop, events, event), time.monotonic() + piece.seconds
        )
        self._batch.add(order)
        left = len(piece.indices)
        try:
            while left:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                item = await loop.run_in_executor(self._decoding, self._picture, piece, event)
                left -= isinstance(item, FinishedPicture)
                yield item
        except (GeneratorExit, asyncio.CancelledError):
            self.cancelled += 1
            raise
        finally:
            self._batch.drop(order)

    def _order(self, piece: Piece, tell: Tell, deadline: float) -> Order:
        grid, start = self.codec.prior_config.grid, piece.start
        given = torch.zeros(0, dtype=torch.int64) if start is None else torch.from_numpy(start)
        return Order(
            text_tokens=self.codec.encode_prompts([piece.prompt])[0].cpu(),
            seeds=[candidate_seed(piece.seed, index) for index in piece.indices],
            sampling=piece.sampling,
            tell=tell,
            primed=given,
            moments=frozenset(moments(len(given) // grid, grid, piece.partial_images)),
            shown=sum(index < piece.shown for index in piece.indices),
            deadline=deadline,
        )

    def _picture(self, piece: Piece, drawn: Drawn) -> PieceItem:
        index, config = piece.indices[drawn.index], self.codec.prior_config
        if drawn.rows < config.grid:
            tokens = torch.zeros(1, config.image_len, dtype=torch.int64)
            tokens[0, : len(drawn.tokens)] = torch.from_numpy(drawn.tokens)
            pixels = partial_pixels(self.codec, tokens, drawn.rows)[0]
            return PartialPicture(index, drawn.rows, pixels)
        pixels = self.codec.decode(torch.from_numpy(drawn.tokens)[None])[0]
        seed = candidate_seed(piece.seed, index)
        return FinishedPicture(index, Sample(pixels, drawn.tokens, seed))


def _tell(
    loop: asyncio.AbstractEventLoop,
    events: asyncio.Queue[Drawn | Exception],
    event: Drawn | Exception,
) -> None:
    with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
        loop.call_soon_threadsafe(events.put_nowait, event)
