"""The sampler behind HTTP, as an ASGI app that any server can host.

The routes are OpenAI's; so is the envelope of every error. One worker thread samples, one request
at a time, because a request's pictures already advance together. Deadlines are the app's own: Ray
Serve lets a client lift its timeout by a header.
"""

import asyncio
import logging
import secrets
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from torch import Tensor

from pipelines.sampling.api import (
    BODY_BYTES,
    ApiError,
    ImagesRequest,
    ServedModel,
    parse_request,
    render_response,
)
from pipelines.sampling.diagnosis import NonFiniteLogits
from pipelines.sampling.drawing import LARGEST_SEED
from pipelines.sampling.engine import Sample, Sampler

SECONDS_BETWEEN_LOOKS = 0.25
# The official client repeats every 5xx twice by itself; a deadline would be missed again.
NO_RETRY = {"x-should-retry": "false"}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServingLimits:
    """What one replica takes on."""

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


class SamplingDesk:
    """Takes requests to the one thread that samples, and bounds how many wait for it."""

    def __init__(self, sampler: Sampler, limits: ServingLimits) -> None:
        self._sampler, self._limits = sampler, limits
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sampler")
        self._places = threading.Semaphore(1 + limits.max_waiting)

    async def sample(
        self, request: ImagesRequest, gone: Callable[[], Awaitable[bool]]
    ) -> list[Sample]:
        """The pictures of a request; `gone` tells whether its client has left."""
        deadline = time.monotonic() + self._limits.deadline_seconds
        if not self._places.acquire(blocking=False):
            raise ApiError(
                "The server is busy; try again later.",
                status=429,
                type="rate_limit_error",
                code="server_busy",
                headers={"retry-after": str(self._limits.retry_after_seconds)},
            )
        stop = threading.Event()
        work = self._thread.submit(self._work, request, deadline, stop)
        work.add_done_callback(lambda _: self._places.release())
        answer = asyncio.wrap_future(work)
        # If this task is cancelled, nobody else will look at how the work ended.
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            while not answer.done():
                await asyncio.wait({answer}, timeout=SECONDS_BETWEEN_LOOKS)
                if time.monotonic() > deadline or await gone():
                    stop.set()
                    if work.cancel():  # it was still waiting for its turn
                        raise _Stop
            return answer.result()
        except _Stop:
            raise self._too_late() from None
        finally:  # Ray Serve cancels this task when the client leaves
            stop.set()
            work.cancel()

    def _work(self, request: ImagesRequest, deadline: float, stop: threading.Event) -> list[Sample]:
        def look(done: int, tokens: Tensor) -> None:
            if stop.is_set() or time.monotonic() > deadline:
                raise _Stop

        return self._sampler.sample(
            [request.prompt],
            n=request.n,
            seed=request.seed,
            sampling=request.sampling,
            on_progress=look,
        )[0]

    def _too_late(self) -> ApiError:
        return ApiError(
            f"The pictures were not ready within {self._limits.deadline_seconds:g} s.",
            status=504,
            type="server_error",
            code="deadline_exceeded",
            headers=NO_RETRY,
        )


def build_app(
    sampler: Sampler, model: ServedModel, limits: ServingLimits, *, host_numbers_requests: bool
) -> FastAPI:
    """The app: images, models, health.

    `host_numbers_requests`: the server around it puts an x-request-id on requests and answers, as
    Ray Serve does; else the app does.
    """
    # No pages of documentation: they load scripts from elsewhere.
    app = FastAPI(title="manray", docs_url=None, redoc_url=None, openapi_url=None)
    desk = SamplingDesk(sampler, limits)

    @app.post("/v1/images/generations")
    async def generate(request: Request) -> JSONResponse:
        _check_media_type(request)
        body = await _read_body(request)
        asked = parse_request(body, model, lambda: secrets.randbelow(LARGEST_SEED + 1))
        samples = await desk.sample(asked, request.is_disconnected)
        return JSONResponse(render_response(asked, model, samples, created=int(time.time())))

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model.card()]}

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> dict[str, Any]:
        if name != model.name:
            raise ApiError(
                f"The model does not exist; this server has {model.name!r}.",
                status=404,
                param="model",
                code="model_not_found",
            )
        return model.card()

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok", "model": model.name}

    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(NonFiniteLogits, _broken_model)
    app.add_middleware(_Envelope, host_numbers_requests=host_numbers_requests)
    return app


class _Envelope:
    """The outermost layer: every answer has a request id, every error its envelope."""

    def __init__(self, app: Asgi, host_numbers_requests: bool) -> None:
        self._app, self._host_numbers = app, host_numbers_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{uuid.uuid4().hex}"
        if self._host_numbers:
            request_id = Headers(scope=scope).get("x-request-id", request_id)[:64]
        started = False

        async def send_with_id(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if not self._host_numbers:
                    MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:  # whatever it is, it goes to the log and not to the client
            log.exception("request %r failed", request_id)
            if started:
                raise
            error = ApiError(
                f"The server had an error; its log names the request {request_id}.",
                status=500,
                type="server_error",
                code="internal_error",
            )
            await _response(error)(scope, receive, send_with_id)


async def _read_body(request: Request) -> bytes:
    """The body, as far as it is not too large: a length that is announced may be a lie."""
    announced = request.headers.get("content-length", "0")
    too_large = ApiError(
        f"The body must be at most {BODY_BYTES} bytes.", status=413, code="body_too_large"
    )
    if announced.isdecimal() and int(announced[:20]) > BODY_BYTES:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_BYTES:
            raise too_large
    return bytes(body)


def _check_media_type(request: Request) -> None:
    """Only JSON: what a foreign web page can make a browser post unasked is another type."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(
            "The header content-type must be application/json.",
            status=415,
            code="unsupported_media_type",
        )


async def _api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return _response(error)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path[:128]}"
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    headers: Mapping[str, str] = error.headers or {}
    return _response(ApiError(message, status=error.status_code, code=code, headers=headers))


async def _broken_model(request: Request, error: Exception) -> JSONResponse:
    log.error("%s", error)
    answer = ApiError(
        "The model gave numbers that are not finite; no picture was made.",
        status=500,
        type="server_error",
        code="model_error",
        headers=NO_RETRY,
    )
    return _response(answer)


def _response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.envelope(), status_code=error.status, headers=error.headers)
