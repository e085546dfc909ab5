"""What draws and ranks behind the ingress: each is a Ray Serve deployment.

A sampler's batch has a process of its own; its replica talks to Ray, encodes prompts and decodes
pictures. One does not outlive the other.
"""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from jobs.serving_metrics import report_load
from pipelines.sampling.batch_process import BatchProcess
from pipelines.sampling.batch_thread import Load
from pipelines.sampling.drawing import SamplingConfig
from pipelines.sampling.loading import (
    DeviceChoice,
    ModelFiles,
    check_files,
    load_batch,
    load_codec,
    torch_device,
)
from pipelines.sampling.packing import Precision
from pipelines.sampling.pieces import FinishedPicture, Piece, PieceItem, PieceSampler
from pipelines.sampling.reranking import load_reranker

FIRST_PIECE = Piece(
    prompt="warm up",
    indices=(0,),
    seed=0,
    sampling=SamplingConfig(),
    start=None,
    partial_images=0,
    shown=0,
    seconds=3600.0,
)


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """What a sampler replica needs to know; travels to it."""

    files: ModelFiles
    digests: Mapping[str, str]
    """SHA-256 that the files had when they were chosen."""
    device: DeviceChoice
    threads: int
    slots: int
    precision: Precision


class SamplerReplica:
    """Draws pieces of requests."""

    async def __init__(self, settings: SamplerSettings) -> None:  # type: ignore[misc]
        """Verify, load, and draw one picture in the way that requests are drawn."""
        self._pieces = load_pieces(settings, on_end=_end)
        await first_picture(self._pieces)
        self._report = asyncio.create_task(report_load(self._pieces))

    async def draw(self, piece: Piece) -> AsyncGenerator[PieceItem, None]:
        """See `PieceSampler.draw`. Serve throws CancelledError into it when the caller leaves."""
        async for item in self._pieces.draw(piece):
            yield item

    async def draw_whole(self, piece: Piece) -> list[PieceItem]:
        """All of a piece at once: one message instead of one a picture."""
        async with aclosing(self._pieces.draw(piece)) as items:
            return [item async for item in items]

    def first_rows(self, picture: np.ndarray, rows: int) -> np.ndarray:
        """See `Codec.first_rows`."""
        return self._pieces.codec.first_rows(picture, rows)

    async def load(self) -> Load:
        """How the batch is doing; waits for a step at most."""
        return await asyncio.to_thread(self._pieces.load)

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises."""
        self._pieces.check()


class RerankerReplica:
    """Scores pictures."""

    def __init__(self, clip: Any, tokenizer: Any, device: DeviceChoice, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._reranker = load_reranker(clip, tokenizer, torch_device(device))
        side = self._reranker.clip.config.image_size
        self._reranker.scores("warm up", np.zeros((1, side, side, 3), np.uint8))

    def scores(self, prompt: str, pictures: np.ndarray) -> np.ndarray:
        """See `Reranker.scores`."""
        return self._reranker.scores(prompt, pictures)


def load_pieces(settings: SamplerSettings, on_end: Callable[[], None]) -> PieceSampler:
    """The sampler of files that still are what they were; for `on_end` see `BatchProcess`.

    Raises ValueError if they are not, or do not belong together.
    """
    import torch

    torch.set_num_threads(settings.threads)
    checked = check_files(settings.files)
    changed = [name for name, digest in settings.digests.items() if checked.digests[name] != digest]
    if changed:
        raise ValueError(
            f"the model files must be those that were chosen, but {', '.join(changed)} changed "
            "since: start the server again"
        )
    batch = partial(
        load_batch,
        settings.files.prior,
        device=settings.device,
        slots=settings.slots,
        precision=settings.precision,
        threads=settings.threads,
    )
    return PieceSampler(load_codec(checked, device=settings.device), BatchProcess(batch, on_end))


async def first_picture(pieces: PieceSampler) -> float:
    """Draw one picture and drop it; the seconds it took. Raises NonFiniteLogits.

    Then the last tokens of as many as there are slots, one more of each than of the one before:
    memory and kernels for every number of slots in use are had now, or are missing now.
    """
    started = time.monotonic()
    async for item in pieces.draw(FIRST_PIECE):
        assert isinstance(item, FinishedPicture)
        tokens = item.sample.tokens
    seconds = time.monotonic() - started

    async def end(left: int) -> None:
        async for _ in pieces.draw(replace(FIRST_PIECE, start=tokens[:-left])):
            pass

    lengths = range(pieces.load().slots)
    await asyncio.gather(*(end(1 + length % (len(tokens) - 1)) for length in lengths))
    return seconds


def trial(settings: SamplerSettings) -> float:
    """Load a model and draw a picture, in a process of its own; the seconds of the picture."""
    pieces = load_pieces(settings, on_end=lambda: None)
    try:
        return asyncio.run(first_picture(pieces))
    finally:
        pieces.close()


def _end() -> None:
    """A replica without its batch: whatever was asked of it is asked of another, as after any death
    of a replica, and Serve starts a new one."""
    os._exit(1)
