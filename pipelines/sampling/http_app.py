"""The Images API, the playground and the probes behind HTTP, as an ASGI app for any server.

The app knows what may be asked and how it is answered; where the pictures come from is a
`PictureSource`'s affair.
"""

import asyncio
import hashlib
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from pipelines.sampling.access import Access
from pipelines.sampling.api import BODY_BYTES, ServedModel, no_such_model, parse_request
from pipelines.sampling.drawing import LARGEST_SEED
from pipelines.sampling.http_body import read_body
from pipelines.sampling.http_drawing import Commission, Studio, error_event, server_busy
from pipelines.sampling.http_envelope import Envelope, api_error, client_gone, http_error
from pipelines.sampling.http_stream import ClientGone, EventStream, Scope, first_item, until_gone
from pipelines.sampling.idempotency import Answers
from pipelines.sampling.multipart import parse_multipart
from pipelines.sampling.openai_edits import EDIT_BODY_BYTES, begun, parse_edit
from pipelines.sampling.openai_errors import ApiError
from pipelines.sampling.picture_source import Busy, PictureSource
from pipelines.sampling.playground import playground

JSON, FORM = "application/json", "multipart/form-data"


async def no_metrics() -> str:
    """What /metrics says where nothing is measured."""
    return ""


async def always_ready() -> str:
    """What keeps the app from answering: nothing."""
    return ""


@dataclass(frozen=True, kw_only=True)
class Operations:
    """What the host tells its operators through the app."""

    metrics: Callable[[], Awaitable[str]] = no_metrics
    """Prometheus' text format."""
    not_ready: Callable[[], Awaitable[str]] = always_ready
    """Why no pictures can be asked for now; empty if they can."""


def build_app(
    source: PictureSource,
    model: ServedModel,
    access: Access,
    operations: Operations = Operations(),
    *,
    host_numbers_requests: bool,
) -> FastAPI:
    """The app: images, models, the playground, probes.

    `host_numbers_requests`: the server around it puts an x-request-id on requests and answers, as
    Ray Serve does; else the app does.
    """
    # No pages of documentation: they load scripts from elsewhere.
    app = FastAPI(title="manray", docs_url=None, redoc_url=None, openapi_url=None)
    _add_images(app, Studio(source, model, access), model, access)
    _add_models(app, model, access)
    _add_operations(app, model, access, operations)
    page = playground()

    @app.get("/")
    async def show_playground() -> Response:
        return Response(page.content, media_type="text/html", headers=page.headers)

    for kind, handler in (
        (ApiError, api_error),
        (HTTPException, http_error),
        (ClientGone, client_gone),
        (ClientDisconnect, client_gone),
    ):
        app.add_exception_handler(kind, handler)
    app.add_middleware(
        Envelope,
        access=access,
        refuse=lambda scope: _refuse_without_room(scope, source, access),
        host_numbers_requests=host_numbers_requests,
    )
    return app


def _refuse_without_room(scope: Scope, source: PictureSource, access: Access) -> None:
    """Under an onslaught nearly all that comes is refused: that must cost next to nothing."""
    if scope["method"] != "POST" or not scope["path"].startswith("/v1/images/"):
        return
    try:
        source.check_room()
    except Busy as error:
        access.holder(Headers(scope=scope))  # whoever has no key is told so
        raise server_busy(error) from None


def _add_images(app: FastAPI, studio: Studio, model: ServedModel, access: Access) -> None:
    answers, one_upload = Answers(), asyncio.Lock()
    settings = access.settings

    @app.post("/v1/images/generations")
    async def generate(request: Request) -> Response:
        holder = access.holder(request.headers)
        body = await read_body(request, JSON, BODY_BYTES, settings.body_seconds)
        wanted, delivery = parse_request(body, model, _random_seed)
        commission = Commission(
            kind="image_generation", holder=holder, request=wanted, delivery=delivery
        )
        return await answer(request, commission, hashlib.sha256(body))

    @app.post("/v1/images/edits")
    async def edit(request: Request) -> Response:
        holder = access.holder(request.headers)
        body = await read_body(request, FORM, EDIT_BODY_BYTES, settings.body_seconds)
        parts = parse_multipart(request.headers["content-type"], body)
        form = parse_edit(parts, model, _random_seed)
        async with one_upload:  # decoding takes memory, many times what was sent
            wanted = await asyncio.to_thread(begun, form, model)
        commission = Commission(
            kind="image_edit", holder=holder, request=wanted, delivery=form.delivery
        )
        digest = hashlib.sha256(b"edit")
        for part in parts:  # not the body: its boundary is another one each time
            digest.update(b"%d %d" % (len(part.name), len(part.data)))
            digest.update(part.name.encode() + part.data)
        return await answer(request, commission, digest)

    async def answer(request: Request, commission: Commission, digest: Any) -> Response:
        _note(request, commission, log_prompts=settings.log_prompts)
        key = request.headers.get("idempotency-key")
        if commission.delivery.stream:
            if key is not None:
                raise ApiError(
                    "Idempotency-Key must be absent with stream: true; the events of a stream are "
                    "not kept. Ask again with the same seed for the same pictures.",
                    code="idempotency_key_with_stream",
                )
            events, seconds = studio.events(commission), settings.keep_alive_seconds
            first = await until_gone(first_item(events, seconds), request.receive)
            return EventStream(events, first, seconds, error_event)
        work = (
            studio.whole(commission)
            if key is None
            else answers.once(
                commission.holder, key, digest.digest(), lambda: studio.whole(commission)
            )
        )
        return Response(await until_gone(work, request.receive), media_type=JSON)


def _add_models(app: FastAPI, model: ServedModel, access: Access) -> None:
    @app.get("/v1/models")
    async def list_models(request: Request) -> dict[str, Any]:
        access.holder(request.headers)
        return {"object": "list", "data": [model.card()]}

    @app.get("/v1/models/{name:path}")
    async def show_model(request: Request, name: str) -> dict[str, Any]:
        access.holder(request.headers)
        if name != model.name:
            raise no_such_model(name, model)
        return model.card()


def _add_operations(
    app: FastAPI, model: ServedModel, access: Access, operations: Operations
) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok", "model": model.name}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        reason = await operations.not_ready()
        status = {"status": "not ready", "reason": reason} if reason else {"status": "ready"}
        return JSONResponse(status, status_code=503 if reason else 200)

    @app.get("/metrics")
    async def metrics(request: Request) -> PlainTextResponse:
        access.holder(request.headers)
        text = await operations.metrics()
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def _note(request: Request, commission: Commission, *, log_prompts: bool) -> None:
    """What the access log says of a request; a client's own name for its user only as a digest."""
    wanted, delivery = commission.request, commission.delivery
    said = request.scope["manray"]
    said |= {
        "holder": commission.holder,
        "n": wanted.n,
        "candidates": wanted.candidates,
        "stream": delivery.stream,
        "prompt_tokens": wanted.prompt_tokens,
    }
    if delivery.user:
        said["user"] = hashlib.sha256(delivery.user.encode(errors="replace")).hexdigest()[:16]
    if log_prompts:
        said["prompt"] = wanted.prompt


def _random_seed() -> int:
    return secrets.randbelow(LARGEST_SEED + 1)
