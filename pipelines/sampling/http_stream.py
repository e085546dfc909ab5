"""Server-sent events, and work that ends when its client leaves."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, MutableMapping
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
T = TypeVar("T")

# A client that takes nothing for so long is as good as gone; its connection is not kept for it.
STALLED_SECONDS = 60.0
KEEP_ALIVE = b": still drawing\n\n"


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


def event(data: dict[str, Any]) -> bytes:
    """An event of the stream, named by its type."""
    text = json.dumps(data, ensure_ascii=False)  # escapes line ends, which would end the event
    return f"event: {data['type']}\ndata: {text}\n\n".encode()


async def until_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """What the work gives; raises ClientGone, after it has ended the work, if the client leaves.

    The request's body must have been read.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and watch.exception() is None:
            raise ClientGone
        return await task
    finally:
        for running in (task, watch):
            running.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def first_item(items: AsyncGenerator[bytes, None], seconds: float) -> "asyncio.Task[bytes]":
    """The first item, or its being waited for after `seconds`; raises what it raises.

    Until then an answer can still have another status than 200.
    """
    first: asyncio.Task[bytes] = asyncio.ensure_future(_next(items))
    try:
        await asyncio.wait({first}, timeout=seconds)
    except asyncio.CancelledError:
        await _end(first, items)
        raise
    if first.done() and first.exception() is not None:
        await _end(first, items)
        first.result()
    return first


class EventStream(Response):
    """An answer of events, with comments in between where there is nothing to say."""

    def __init__(
        self,
        items: AsyncGenerator[bytes, None],
        first: "asyncio.Task[bytes]",
        keep_alive_seconds: float,
        on_error: Callable[[Exception], bytes],
    ) -> None:
        """`on_error` makes an event of what goes wrong, for the stream to end with."""
        self._items, self._first, self._seconds = items, first, keep_alive_seconds
        self._on_error = on_error
        self.status_code, self.background, self.body = 200, None, b""
        self.init_headers(
            {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-store",
                "x-accel-buffering": "no",  # nginx would hold events back
            }
        )
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events while there is somebody to receive them."""
        try:
            await until_gone(self._pump(send), receive)
        except ClientGone:
            scope.setdefault("manray", {})["status"] = 499

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        waiting = self._first
        try:
            while True:
                done, _ = await asyncio.wait({waiting}, timeout=self._seconds)
                if not done:
                    await _within(send(_chunk(KEEP_ALIVE)))
                    continue
                try:
                    item = waiting.result()
                except StopAsyncIteration:
                    break
                except Exception as error:  # the client is told: the status has long been sent
                    await _within(send(_chunk(self._on_error(error))))
                    break
                waiting = asyncio.ensure_future(_next(self._items))
                await _within(send(_chunk(item)))
        finally:
            await _end(waiting, self._items)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _next(items: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(items)


async def _end(waiting: "asyncio.Task[bytes]", items: AsyncGenerator[bytes, None]) -> None:
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    async with aclosing(items):
        pass


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _within(sending: Awaitable[None]) -> None:
    try:
        async with asyncio.timeout(STALLED_SECONDS):
            await sending
    except TimeoutError:
        raise ClientGone from None


def _chunk(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}
