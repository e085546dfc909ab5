"""An HTTP server in a process that has an event loop already, on a port that several may share.

Ray Serve's proxies are processes of their own: a request goes from one through Ray to the app and
back, for some ten milliseconds of CPU, and one that is refused costs hardly less. Here the app's
process accepts connections itself.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import uvicorn
from starlette.datastructures import MutableHeaders

Message = Any
Asgi = Callable[[Any, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Any]

# Longer than load balancers keep theirs, so that it is they who close: nothing is sent into a
# connection that is just being closed here.
IDLE_SECONDS = 90
TICK_SECONDS = 0.05
BACKLOG = 2048


class Listener:
    """Serves an app from within the running loop until it is closed."""

    def __init__(self, app: Asgi, host: str, port: int) -> None:
        """Raises OSError if the port cannot be listened on."""
        self._app, self._leaving = app, False
        self._socket = shared_socket(host, port)
        self._socket.listen(BACKLOG)  # from now on nobody is turned away
        self._server = _Server(
            uvicorn.Config(
                self._answer,
                interface="asgi3",  # it takes a method for an app of the older kind
                log_config=None,
                access_log=False,  # the app writes its own
                server_header=False,
                lifespan="off",
                ws="none",
                backlog=BACKLOG,
                timeout_keep_alive=IDLE_SECONDS,
            )
        )
        self._serving = asyncio.create_task(self._server.serve([self._socket]))

    @property
    def requests_under_way(self) -> int:
        """Requests that are being answered."""
        return len(self._server.server_state.tasks)

    def check(self) -> None:
        """Raises RuntimeError once it does not serve any more, though nobody closed it."""
        if self._serving.done() and not self._leaving:
            raise RuntimeError("the HTTP server ended") from self._serving.exception()

    async def close(self, seconds: float) -> None:
        """Accept nothing new and let requests end.

        For `seconds` at most, clients that keep connections open are asked with their next answer
        to come back on another, which whoever shares the port accepts.
        """
        self._leaving = True
        for server in self._server.servers:
            server.close()
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while self._server.server_state.connections and loop.time() < end:
            await asyncio.sleep(TICK_SECONDS)
        self._server.should_exit = True
        with suppress(asyncio.CancelledError):
            await self._serving

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_and_part(message: Message) -> None:
            if self._leaving and message["type"] == "http.response.start":
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        await self._app(scope, receive, send_and_part)


class _Server(uvicorn.Server):
    """Without its own handlers of signals: the process is Ray's."""

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        await self._serve(sockets)


def shared_socket(host: str, port: int) -> socket.socket:
    """A bound socket; connections are spread over all who bind the same port in this way.

    Only processes of the same user may.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind((host, port))
    except OSError:
        made.close()
        raise
    return made
