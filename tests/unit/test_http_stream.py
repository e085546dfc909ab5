"""Work that ends when its client leaves, whatever it is doing at that moment."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from pipelines.sampling.http_stream import EventStream, Message, first_item

ENOUGH = 100


@pytest.mark.parametrize("turns_later", range(6))
def test_a_client_that_leaves_while_an_event_is_sent_ends_the_drawing(turns_later: int) -> None:
    """A lost connection lets whoever waits to send go on, in the turn of the loop that tells it."""
    made = asyncio.run(asyncio.wait_for(_stream(turns_later), 60))
    assert made < 10  # of a hundred


async def _stream(turns_later: int) -> int:
    """How many events were made for a client that leaves while the first one is sent."""
    made, full, lost = 0, asyncio.Event(), asyncio.Event()
    ended = False

    async def items() -> AsyncGenerator[bytes, None]:
        nonlocal made, ended
        try:
            while made < ENOUGH:
                made += 1
                yield b"event"
                await asyncio.sleep(0)
        finally:
            ended = True

    async def send(message: Message) -> None:
        if message.get("body"):
            full.set()
            await lost.wait()

    async def receive() -> Message:
        await lost.wait()
        for _ in range(turns_later):
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    drawn = items()
    stream = EventStream(drawn, await first_item(drawn, 1), 60, lambda error: b"")
    scope: dict[str, Any] = {}
    serving = asyncio.ensure_future(stream(scope, receive, send))
    await full.wait()
    lost.set()
    await serving
    assert scope["manray"]["status"] == 499
    assert ended
    return made
