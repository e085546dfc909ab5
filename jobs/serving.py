"""The processes of the server: HTTP, samplers, rerankers; each is a Ray Serve deployment.

Requests come to an `Ingress`, whose `FanOut` gives pieces of them to `SamplerReplica`s and pictures
to `RerankerReplica`s. Arguments and results are those of the local pieces; a handle is a hop more.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.listening import Listener
from jobs.rate_limits import SharedBudget
from jobs.serving_metrics import IngressMetrics, report_load, report_requests
from pipelines.data.tokenizer import CaptionTokenizer
from pipelines.sampling.access import Access, AccessSettings
from pipelines.sampling.api import ServedModel
from pipelines.sampling.batch_thread import Load
from pipelines.sampling.drawing import SamplingConfig
from pipelines.sampling.engine import check_prompt
from pipelines.sampling.fan_out import SCORED_TOGETHER, FanOut, SamplerGone, Samplers
from pipelines.sampling.http_app import Operations, build_app
from pipelines.sampling.loading import (
    DeviceChoice,
    ModelFiles,
    check_files,
    load_sampler,
    torch_device,
)
from pipelines.sampling.packing import Precision
from pipelines.sampling.picture_source import Busy, ServingLimits
from pipelines.sampling.pieces import FinishedPicture, Piece, PieceItem, PieceSampler
from pipelines.sampling.reranking import load_reranker

if TYPE_CHECKING:
    from fastapi import FastAPI

PATIENCE_SECONDS = 5.0
SECONDS_TO_MOVE = 2.0  # for clients that keep a connection, to the replica that takes over
LARGEST_POOL = 512  # paper, 2.6
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


@dataclass(frozen=True, kw_only=True)
class IngressSettings:
    """What an ingress replica needs to know; travels to it."""

    model: Mapping[str, Any]
    """Fields of `ServedModel` that are no functions."""
    prompt_limit: int
    files: ModelFiles
    samplers: int
    """Sampler replicas that there may be, for each ingress replica."""
    slots: int
    limits: ServingLimits
    access: AccessSettings
    address: tuple[str, int] | None
    """Where the ingress listens itself; None: Ray Serve's proxies do."""


class SamplerReplica:
    """Draws pieces of requests."""

    async def __init__(self, settings: SamplerSettings) -> None:  # type: ignore[misc]
        """Verify, load, and draw one picture in the way that requests are drawn."""
        self._pieces = load_pieces(settings)
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
        """See `Sampler.first_rows`."""
        return self._pieces.sampler.first_rows(picture, rows)

    def load(self) -> Load:
        """How the batch is doing."""
        return self._pieces.load()

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


class Ingress:
    """Knows where pictures come from, and what is said over HTTP."""

    def __init__(self, settings: IngressSettings, samplers: Any, reranker: Any = None) -> None:
        _show_access_log()
        self._samplers, self._reranker = samplers, reranker
        self._stream = samplers.options(stream=True)
        self._metrics = IngressMetrics()
        self._source = FanOut(
            Samplers(
                draw=self._draw,
                count=settings.samplers,
                slots=settings.slots,
                score=None if reranker is None else self._score,
            ),
            settings.limits,
            self._metrics.first_picture,
        )
        tokenizer = CaptionTokenizer.from_file(settings.files.tokenizer)
        model = ServedModel(
            **settings.model,
            check_prompt=lambda prompt: check_prompt(tokenizer, settings.prompt_limit, prompt),
            first_rows=self._first_rows,
            largest_pool=0 if reranker is None else LARGEST_POOL,
        )
        self._app = build_app(
            self._source,
            model,
            Access(settings.access, SharedBudget(settings.access.rate)),
            Operations(metrics=self._said, not_ready=self._not_ready),
            host_numbers_requests=settings.address is None,
        )

        self._report = asyncio.create_task(report_requests(self._metrics, self._source))

    def __serve_build_asgi_app__(self) -> "FastAPI":
        return self._app

    async def _draw(self, piece: Piece) -> AsyncGenerator[PieceItem, None]:
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import (
            BackPressureError,
            DeploymentUnavailableError,
            ReplicaUnavailableError,
        )

        together = not piece.partial_images and len(piece.indices) <= SCORED_TOGETHER
        draw = self._samplers.draw_whole if together else self._stream.draw
        answer, ended = draw.remote(piece), False
        try:
            if together:
                for item in await answer:
                    yield item
            else:
                async for item in answer:
                    yield item
            ended = True
        except (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError) as error:
            raise SamplerGone from error
        except BackPressureError as error:
            raise Busy(PATIENCE_SECONDS) from error
        finally:
            if not ended:
                answer.cancel()

    async def _score(self, prompt: str, pictures: np.ndarray) -> np.ndarray:
        scores: np.ndarray = await self._reranker.scores.remote(prompt, pictures)
        return scores

    def _first_rows(self, picture: np.ndarray, rows: int) -> np.ndarray:
        """Called in a thread, so it may wait."""
        tokens: np.ndarray = self._samplers.first_rows.remote(picture, rows).result(
            timeout_s=PATIENCE_SECONDS
        )
        return tokens

    async def _not_ready(self) -> str:
        try:
            await asyncio.wait_for(self._samplers.load.remote(), PATIENCE_SECONDS)
        except Exception as error:  # whatever it is, nothing can be drawn
            return f"no sampler answers within {PATIENCE_SECONDS:g} s ({type(error).__name__})"
        return ""

    async def _said(self) -> str:
        return self._metrics.text(self._source)


class ListeningIngress(Ingress):
    """Accepts connections itself."""

    def __init__(self, settings: IngressSettings, samplers: Any, reranker: Any = None) -> None:
        super().__init__(settings, samplers, reranker)
        assert settings.address is not None
        self._listener = Listener(self._app, *settings.address)

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises."""
        self._listener.check()

    async def __del__(self) -> None:
        """Called by Serve before the process ends."""
        await self._listener.close(SECONDS_TO_MOVE)


def _show_access_log() -> None:
    """Its lines, which are JSON already, go to the replica's stderr: a file among Ray's logs."""
    access = logging.getLogger("manray.access")
    access.setLevel(logging.INFO)
    access.propagate = False
    access.handlers = [logging.StreamHandler()]


def load_pieces(settings: SamplerSettings) -> PieceSampler:
    """The sampler of files that still are what they were.

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
    sampler = load_sampler(settings.files, device=settings.device, max_candidates=settings.slots)
    return PieceSampler(sampler, settings.slots, settings.precision)


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
    return asyncio.run(first_picture(load_pieces(settings)))
