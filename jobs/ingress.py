"""The server's process that speaks HTTP: a Ray Serve deployment in front of those in `replicas.py`.

Requests come to an `Ingress`, whose `FanOut` gives pieces of them to `SamplerReplica`s and pictures
to `RerankerReplica`s. Arguments and results are those of the local pieces; a handle is a hop more.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.listening import Listener
from jobs.rate_limits import SharedBudget
from jobs.serving_metrics import IngressMetrics, report_requests
from pipelines.data.tokenizer import CaptionTokenizer
from pipelines.sampling.access import Access, AccessSettings
from pipelines.sampling.api import ServedModel
from pipelines.sampling.codec import check_prompt
from pipelines.sampling.fan_out import SCORED_TOGETHER, FanOut, SamplerGone, Samplers
from pipelines.sampling.http_app import Operations, build_app
from pipelines.sampling.loading import ModelFiles
from pipelines.sampling.picture_source import Busy, ServingLimits
from pipelines.sampling.pieces import Piece, PieceItem

if TYPE_CHECKING:
    from fastapi import FastAPI

PATIENCE_SECONDS = 5.0
SECONDS_TO_MOVE = 2.0  # for clients that keep a connection, to the replica that takes over
LARGEST_POOL = 512  # paper, 2.6
MESSAGE_BYTES = 3 << 20  # of pictures: Serve lets 4 MB through between its processes


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


class Ingress:
    """Knows where pictures come from, and what is said over HTTP."""

    def __init__(self, settings: IngressSettings, samplers: Any, reranker: Any = None) -> None:
        _show_access_log()
        self._samplers, self._reranker = samplers, reranker
        if SCORED_TOGETHER * 3 * settings.model["image_size"] ** 2 <= MESSAGE_BYTES:
            # By gRPC from process to process, which takes two milliseconds of CPU a request less
            # than Ray's object store, and checks the cluster's token too.
            self._samplers = samplers.options(
                _by_reference=False, request_serialization="pickle", response_serialization="pickle"
            )
        self._stream = self._samplers.options(stream=True)
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
            async with asyncio.timeout(PATIENCE_SECONDS):
                await self._samplers.load.remote()
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
