"""From a request that is understood to its pictures: policies, the key's budget, the source."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from pipelines.sampling.access import Access
from pipelines.sampling.api import Delivery, ImagesRequest, ServedModel
from pipelines.sampling.diagnosis import NonFiniteLogits
from pipelines.sampling.http_stream import event
from pipelines.sampling.openai_answers import (
    Kind,
    completed_event,
    partial_event,
    render_response,
)
from pipelines.sampling.openai_errors import NO_RETRY, SERVER_ERROR, ApiError, try_later
from pipelines.sampling.picture_source import (
    Busy,
    PartialPicture,
    PictureSource,
    RankedPicture,
    TooLate,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Commission:
    """A request, whose it is, and how the pictures are wanted."""

    kind: Kind
    holder: str
    request: ImagesRequest
    delivery: Delivery


class Studio:
    """Draws what may be drawn, as it is wanted."""

    def __init__(self, source: PictureSource, model: ServedModel, access: Access) -> None:
        self._source, self._model, self._access = source, model, access

    async def whole(self, commission: Commission) -> bytes:
        """The answer's JSON; raises ApiError."""
        pictures: list[RankedPicture] = []
        async with aclosing(self._draw(commission)) as items:
            async for item in items:
                if isinstance(item, list):
                    pictures = item
        request, delivery = commission.request, commission.delivery

        def answer() -> bytes:
            created = int(time.time())
            return json.dumps(
                render_response(request, delivery, self._model, pictures, created=created)
            ).encode()

        return await asyncio.to_thread(answer)

    async def events(self, commission: Commission) -> AsyncGenerator[bytes, None]:
        """The answer's events; raises ApiError."""
        async with aclosing(self._draw(commission)) as items:
            numbers: dict[int, int] = {}
            async for item in items:
                for text in await asyncio.to_thread(self._said, commission, item, numbers):
                    yield text

    def _said(
        self,
        commission: Commission,
        item: PartialPicture | list[RankedPicture],
        numbers: dict[int, int],
    ) -> list[bytes]:
        """The events of what was drawn; `numbers` counts how often a picture was shown."""
        kind, request, delivery = commission.kind, commission.request, commission.delivery
        created = int(time.time())
        if isinstance(item, PartialPicture):
            number = numbers.get(item.index, 0)
            numbers[item.index] = number + 1
            data = partial_event(
                kind, request, item, number, delivery, self._model, created=created
            )
            return [event(data)]
        ranked = enumerate(item)
        return [
            event(
                completed_event(
                    kind, request, picture, rank, delivery, self._model, created=created
                )
            )
            for rank, picture in ranked
        ]

    async def _draw(
        self, commission: Commission
    ) -> AsyncGenerator[PartialPicture | list[RankedPicture], None]:
        """What the source gives, if it may be shown; every error is an ApiError that says it."""
        request, policies = commission.request, self._access.policies
        await policies.check_prompt(request.prompt)
        await self._pay(commission)
        try:
            async with aclosing(self._source.draw(request)) as items:
                async for item in items:
                    shown = (
                        [item.pixels]
                        if isinstance(item, PartialPicture)
                        else [picture.sample.pixels for picture in item]
                    )
                    await policies.check_pictures(shown)
                    yield item
        except Busy as error:
            await self._access.budget.give_back(commission.holder, request.candidates)
            raise server_busy(error) from None
        except TooLate:
            raise ApiError(
                "The pictures were not ready within the server's time limit.",
                status=504,
                type=SERVER_ERROR,
                code="deadline_exceeded",
                headers=NO_RETRY,
            ) from None
        except NonFiniteLogits as error:
            log.error("%s", error)
            raise ApiError(
                "The model gave numbers that are not finite; no picture was made.",
                status=500,
                type=SERVER_ERROR,
                code="model_error",
                headers=NO_RETRY,
            ) from None

    async def _pay(self, commission: Commission) -> None:
        request, rate = commission.request, self._access.settings.rate
        if rate.pictures_per_minute and request.candidates > rate.burst:
            name = "rerank_pool" if request.rerank_pool else "n"
            raise ApiError(
                f"{name} must be at most {rate.burst} under this server's rate limit, "
                f"got {request.candidates}.",
                param=name,
                code="out_of_range",
            )
        try:
            seconds = await self._access.budget.take(commission.holder, request.candidates)
        except Exception as error:  # wherever it is kept; without it there would be no limit
            log.exception("the rate limits could not be asked")
            raise ApiError(
                "The rate limits cannot be checked just now.",
                status=503,
                type=SERVER_ERROR,
                code="limits_unreadable",
            ) from error
        if seconds > 0:
            raise try_later(
                f"This key has had its {rate.pictures_per_minute:g} pictures a minute; the next "
                f"{request.candidates} may be drawn in {seconds:.0f} s.",
                "rate_limit_exceeded",
                seconds,
            )


def server_busy(error: Busy) -> ApiError:
    """The refusal."""
    return try_later(
        "The server is busy; try again later.", "server_busy", error.retry_after_seconds
    )


def error_event(error: Exception) -> bytes:
    """What a stream that has begun ends with, where an answer of its own is no longer possible."""
    if not isinstance(error, ApiError):  # whatever it is, it goes to the log, not to the client
        log.error("a stream failed", exc_info=error)
        error = ApiError(
            "The server had an error.", status=500, type=SERVER_ERROR, code="internal_error"
        )
    return event({"type": "error"} | error.envelope())
