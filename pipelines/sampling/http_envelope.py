"""The outermost layer of the app: ids, envelopes, the door, the log.

Every answer has a request id, every error OpenAI's envelope, and no answer a stack trace.
"""

import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException

from pipelines.sampling.access import Access
from pipelines.sampling.http_stream import ClientGone, Message, Receive, Scope, Send
from pipelines.sampling.openai_errors import SERVER_ERROR, ApiError

Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]
CLIENT_GONE = 499  # nobody sees it but the log
ANSWER_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
}

log = logging.getLogger(__name__)
access_log = logging.getLogger("manray.access")


class Envelope:
    """ASGI middleware; the app inside may add to `scope["manray"]` what the log is to say."""

    def __init__(
        self,
        app: Asgi,
        access: Access,
        refuse: Callable[[Scope], None],
        host_numbers_requests: bool,
    ) -> None:
        """`refuse` raises ApiError for what can be refused before anything of it is read."""
        self._app, self._access, self._refuse = app, access, refuse
        self._host_numbers = host_numbers_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{uuid.uuid4().hex}"
        if self._host_numbers:
            request_id = Headers(scope=scope).get("x-request-id", request_id)[:64]
        started, begun = time.monotonic(), False
        said: dict[str, Any] = {"status": CLIENT_GONE}
        scope["manray"] = said

        async def send_with_id(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun, said["status"] = True, message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in ANSWER_HEADERS.items():
                    headers.setdefault(name, value)
                if not self._host_numbers:
                    headers["x-request-id"] = request_id
            await send(message)

        try:
            self._access.check_host(Headers(scope=scope))
            self._refuse(scope)
            await self._app(scope, receive, send_with_id)
        except ApiError as refused:
            said["code"] = refused.code
            await error_response(refused)(scope, receive, send_with_id)
        except Exception:  # whatever it is, it goes to the log and not to the client
            log.exception("request %r failed", request_id)
            if begun:
                raise
            error = ApiError(
                f"The server had an error; its log names the request {request_id}.",
                status=500,
                type=SERVER_ERROR,
                code="internal_error",
            )
            await error_response(error)(scope, receive, send_with_id)
        finally:
            self._note(scope, request_id, time.monotonic() - started)

    def _note(self, scope: Scope, request_id: str, seconds: float) -> None:
        if self._access.settings.access_log:
            line = {
                "request": request_id,
                "method": scope["method"],
                "path": scope["path"][:128],
                "seconds": round(seconds, 3),
            }
            access_log.info("%s", json.dumps(line | scope["manray"]))


async def api_error(request: Request, error: Exception) -> JSONResponse:
    """What the app refuses."""
    assert isinstance(error, ApiError)
    request.scope["manray"]["code"] = error.code
    return error_response(error)


async def http_error(request: Request, error: Exception) -> JSONResponse:
    """404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path[:128]}"
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    headers: Mapping[str, str] = error.headers or {}
    return error_response(ApiError(message, status=error.status_code, code=code, headers=headers))


async def client_gone(request: Request, error: Exception) -> JSONResponse:
    """An answer to nobody."""
    assert isinstance(error, ClientGone)
    return JSONResponse(None, status_code=CLIENT_GONE)


def error_response(error: ApiError) -> JSONResponse:
    """An error as an answer."""
    return JSONResponse(error.envelope(), status_code=error.status, headers=error.headers)
