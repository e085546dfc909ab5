"""A request's candidates over several samplers, and the best of them back.

Knows neither processes nor networks: samplers and reranker are functions. One sampler in this
process (`SlotPictures`) is as good as replicas elsewhere (`jobs/serving.py`).
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from pipelines.sampling.api import ImagesRequest
from pipelines.sampling.batch_thread import BatchThread
from pipelines.sampling.batching import Batch
from pipelines.sampling.engine import Sampler
from pipelines.sampling.openai_errors import SERVER_ERROR, ApiError
from pipelines.sampling.packing import Precision
from pipelines.sampling.picture_source import (
    Busy,
    Item,
    PartialPicture,
    RankedPicture,
    Scorer,
    ServingLimits,
    TooLate,
)
from pipelines.sampling.pieces import FinishedPicture, Piece, PieceItem, PieceSampler, piece_of

SCORED_TOGETHER = 16
"""Pictures that are sent to the reranker at once, while others are still drawn."""
# What a request that is on its way out may need beyond its deadline, which the sampler keeps.
SPARE_SECONDS = 5.0

Ended = TypeVar("Ended")
DrawPiece = Callable[[Piece], AsyncGenerator[PieceItem, None]]
Score = Callable[[str, np.ndarray], Awaitable[np.ndarray]]


class SamplerGone(Exception):
    """The process that drew a piece ended; the same piece may be given to another."""


@dataclass(frozen=True, kw_only=True)
class Samplers:
    """What there is to draw with."""

    draw: DrawPiece
    count: int
    """Samplers, at most."""
    slots: int
    """Pictures that each draws at once."""
    score: Score | None = None


@dataclass
class Tally:
    """What became of requests, since the process began."""

    begun: int = 0
    refused: int = 0
    late: int = 0
    cancelled: int = 0
    failed: int = 0
    retried: int = 0
    """Pieces that were drawn again because their sampler ended."""


class FanOut:
    """A `PictureSource`: admits, spreads, ranks."""

    def __init__(
        self,
        samplers: Samplers,
        limits: ServingLimits,
        on_first: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """`on_first` is told how long a request waited for its first picture, whole or partial."""
        self._samplers, self._limits, self._on_first = samplers, limits, on_first
        self._slots = samplers.count * samplers.slots
        self.tally = Tally()
        self.load = 0
        """Slots that the requests under way want; a pool counts as a quarter of all."""

    async def draw(self, request: ImagesRequest) -> AsyncGenerator[Item, None]:
        """See `PictureSource.draw`."""
        if request.rerank_pool and self._samplers.score is None:
            raise ValueError("rerank_pool must be 0 where there is no reranker")
        self.check_room()
        # A pool yields to others, so it does not keep them out either.
        cost = min(request.candidates * (1 + request.sampling.guided), max(1, self._slots // 4))
        self.load += cost
        self.tally.begun += 1
        try:
            async with aclosing(self._pictures(request)) as items:
                async for item in items:
                    yield item
        except (GeneratorExit, asyncio.CancelledError):
            self.tally.cancelled += 1
            raise
        except TooLate:
            self.tally.late += 1
            raise
        except Exception:
            self.tally.failed += 1
            raise
        finally:
            self.load -= cost

    def check_room(self) -> None:
        """See `PictureSource.check_room`; counts who is refused."""
        if self.load >= self._slots + self._limits.max_waiting:
            self.tally.refused += 1
            raise Busy(self._limits.retry_after_seconds)

    async def _pictures(self, request: ImagesRequest) -> AsyncGenerator[Item, None]:
        started = time.monotonic()
        deadline = started + self._limits.deadline_seconds
        best, items = _Best(request, self._samplers.score), asyncio.Queue[PieceItem]()
        work = [self._piece(request, part, deadline, items) for part in self._parts(request)]
        drawing = asyncio.ensure_future(_all(work))
        first = True
        try:
            while not (drawing.done() and items.empty()):
                item = await _next(items, drawing, deadline + SPARE_SECONDS)
                if item is None:
                    continue
                if first:
                    self._on_first(time.monotonic() - started)
                    first = False
                if isinstance(item, PartialPicture):
                    yield item
                else:
                    await _until(best.add(item), deadline)
            drawing.result()
            ranked = await _until(best.ranked(), deadline)
        finally:
            drawing.cancel()
            await asyncio.gather(drawing, return_exceptions=True)
        yield ranked

    def _parts(self, request: ImagesRequest) -> list[tuple[int, ...]]:
        """The candidates' indices, one part a sampler; few stay together."""
        count, slots = request.candidates, self._samplers.slots
        parts = min(self._samplers.count, -(-count // slots))
        return [tuple(range(part, count, parts)) for part in range(parts)]

    async def _piece(
        self,
        request: ImagesRequest,
        indices: tuple[int, ...],
        deadline: float,
        items: asyncio.Queue[PieceItem],
    ) -> None:
        """Draw some candidates; once more if their sampler ends, which gives the same pictures."""
        left, shown = list(indices), set[tuple[int, int]]()
        for chance in (True, False):
            piece = piece_of(request, tuple(left), deadline - time.monotonic())
            try:
                async with aclosing(self._samplers.draw(piece)) as drawn:
                    async for item in drawn:
                        if isinstance(item, FinishedPicture):
                            left.remove(item.index)
                        elif (item.index, item.rows) in shown:
                            continue
                        else:
                            shown.add((item.index, item.rows))
                        items.put_nowait(item)
                return
            except SamplerGone as error:
                if not chance:
                    raise _gone() from error
                self.tally.retried += 1


class _Best:
    """The pictures of a request that will be given out: all, or the best of a pool so far."""

    def __init__(self, request: ImagesRequest, score: Score | None) -> None:
        self._request, self._score = request, score if request.rerank_pool else None
        self._kept: list[tuple[float, int, RankedPicture]] = []
        self._unscored: list[FinishedPicture] = []

    async def add(self, picture: FinishedPicture) -> None:
        if self._score is None:
            self._kept.append((0.0, picture.index, RankedPicture(picture.sample, None)))
            return
        self._unscored.append(picture)
        if len(self._unscored) == SCORED_TOGETHER:
            await self._rank()

    async def ranked(self) -> list[RankedPicture]:
        """The `n` best, best first; of equal ones, or without a reranker, the earlier one first."""
        if self._unscored:
            await self._rank()
        return [picture for _, _, picture in sorted(self._kept, key=lambda kept: kept[:2])]

    async def _rank(self) -> None:
        assert self._score is not None
        batch, self._unscored = self._unscored, []
        pixels = np.stack([picture.sample.pixels for picture in batch])
        scores = await self._score(self._request.prompt, pixels)
        for picture, score in zip(batch, scores.tolist(), strict=True):
            self._kept.append((-score, picture.index, RankedPicture(picture.sample, score)))
        self._kept = sorted(self._kept, key=lambda kept: kept[:2])[: self._request.n]


class SlotPictures(FanOut):
    """A `PictureSource` of one sampler in this process."""

    def __init__(
        self,
        sampler: Sampler,
        limits: ServingLimits,
        reranker: Scorer | None = None,
        *,
        precision: Precision = "fp32",
    ) -> None:
        """As many slots as the sampler draws candidates at once."""
        batch = Batch(sampler.packed, sampler.max_candidates, precision)
        self.pieces = PieceSampler(sampler, BatchThread(batch))

        async def score(prompt: str, pictures: np.ndarray) -> np.ndarray:
            assert reranker is not None
            return await asyncio.to_thread(reranker.scores, prompt, pictures)

        samplers = Samplers(
            draw=self.pieces.draw,
            count=1,
            slots=sampler.max_candidates,
            score=None if reranker is None else score,
        )
        super().__init__(samplers, limits)


async def _all(work: list[Coroutine[Any, Any, None]]) -> None:
    """All of it; the first error ends the rest."""
    try:
        async with asyncio.TaskGroup() as group:
            for piece in work:
                group.create_task(piece)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _next(
    items: asyncio.Queue[PieceItem], drawing: "asyncio.Future[None]", deadline: float
) -> PieceItem | None:
    """The next item; None if drawing has ended meanwhile."""
    getting = asyncio.ensure_future(items.get())
    waited: set[asyncio.Future[Any]] = {getting, drawing}
    try:
        left = deadline - time.monotonic()
        done, _ = await asyncio.wait(waited, timeout=left, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not getting.done():
            getting.cancel()
    if not done:
        raise TooLate
    if getting in done:
        return getting.result()
    drawing.result()
    return None


async def _until(work: Awaitable[Ended], deadline: float) -> Ended:
    try:
        async with asyncio.timeout(deadline + SPARE_SECONDS - time.monotonic()):
            return await work
    except TimeoutError:
        raise TooLate from None


def _gone() -> ApiError:
    """Twice is no accident: these pictures may be what ends samplers."""
    return ApiError(
        "The process that drew the pictures ended before they were done, and so did a second one.",
        status=503,
        type=SERVER_ERROR,
        code="sampler_ended",
        headers={"x-should-retry": "false"},
    )
