"""Pictures from one sampler in this process, one request at a time.

A request's pictures already advance together, so one thread samples. Deadlines are our own: Ray
Serve lets a client lift its timeout by a header.

Letters: B pictures of a group, K image tokens, H and W the picture's sides.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from pipelines.sampling.api import ImagesRequest
from pipelines.sampling.engine import Sample, Sampler, Start
from pipelines.sampling.picture_source import Busy, PartialPicture, RankedPicture, TooLate

GREY = 128
SECONDS_BETWEEN_LOOKS = 0.25

Item = PartialPicture | list[RankedPicture]
Tell = Callable[[Item], None]


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


class _Stop(Exception):
    """Ends a sampling that nobody waits for any more."""


class LocalPictures:
    """A `PictureSource`: takes requests to the thread that samples, bounds how many wait."""

    def __init__(
        self, sampler: Sampler, limits: ServingLimits, reranker: Scorer | None = None
    ) -> None:
        self._sampler, self._limits, self._reranker = sampler, limits, reranker
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sampler")
        self._places = threading.Semaphore(1 + limits.max_waiting)

    async def draw(self, request: ImagesRequest) -> AsyncGenerator[Item, None]:
        """See `PictureSource.draw`."""
        deadline = time.monotonic() + self._limits.deadline_seconds
        if not self._places.acquire(blocking=False):
            raise Busy(self._limits.retry_after_seconds)
        stop, items = threading.Event(), asyncio.Queue[Item | None]()
        loop = asyncio.get_running_loop()

        def tell(item: Item | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(items.put_nowait, item)

        def end(_: Future[None]) -> None:
            self._places.release()
            tell(None)

        work = self._thread.submit(self._work, request, deadline, stop, tell)
        work.add_done_callback(end)
        try:
            while True:
                try:
                    item = await asyncio.wait_for(items.get(), SECONDS_BETWEEN_LOOKS)
                except TimeoutError:
                    if time.monotonic() > deadline and work.cancel():  # it still waits for its turn
                        raise TooLate from None
                    continue
                if item is None:
                    break
                yield item
            work.result()
        except _Stop:
            raise TooLate from None
        finally:
            stop.set()
            work.cancel()

    def _work(
        self, request: ImagesRequest, deadline: float, stop: threading.Event, tell: Tell
    ) -> None:
        progress = _Progress(self._sampler, request, tell)

        def look(done: int, tokens: Tensor) -> None:
            if stop.is_set() or time.monotonic() > deadline:
                raise _Stop
            progress.look(done, tokens)

        (samples,) = self._sampler.sample(
            [request.prompt],
            n=request.candidates,
            seed=request.seed,
            sampling=request.sampling,
            start=Start(tokens=request.start),
            on_progress=look,
        )
        tell(self._ranked(request, samples))

    def _ranked(self, request: ImagesRequest, samples: list[Sample]) -> list[RankedPicture]:
        if not request.rerank_pool or self._reranker is None:
            return [RankedPicture(sample, None) for sample in samples]
        pictures = np.stack([sample.pixels for sample in samples])
        scores = self._reranker.scores(request.prompt, pictures)
        best = np.argsort(-scores, kind="stable")[: request.n]
        return [RankedPicture(samples[index], float(scores[index])) for index in best]


class _Progress:
    """Shows the first `n` pictures while they are drawn, group after group."""

    def __init__(self, sampler: Sampler, request: ImagesRequest, tell: Tell) -> None:
        self._sampler, self._request, self._tell = sampler, request, tell
        self._grid = sampler.prior.config.grid
        given = 0 if request.start is None else len(request.start) // self._grid
        self._moments = moments(given, self._grid, request.partial_images)
        self._first = 0
        """The group's first picture."""

    def look(self, done: int, tokens: Tensor) -> None:
        rows, rest = divmod(done, self._grid)
        if rest == 0 and rows in self._moments and self._first < self._request.n:
            pictures = partial_pixels(self._sampler, tokens[: self._request.n - self._first], rows)
            for index, pixels in enumerate(pictures):
                self._tell(PartialPicture(self._first + index, rows, pixels))
        if done == tokens.shape[1]:
            self._first += len(tokens)


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
