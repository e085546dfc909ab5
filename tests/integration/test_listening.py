"""The server that accepts connections itself: shares its port, leaves it without losing anybody,
and refuses without reading."""

import asyncio
import json
import socket
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from jobs.listening import Listener, shared_socket
from pipelines.sampling.access import Access, AccessSettings
from pipelines.sampling.http_app import build_app
from pipelines.sampling.picture_source import Busy
from tests.fixtures.http_server import model_of
from tests.fixtures.models import tiny_models
from tests.fixtures.ports import free_port

HOST = "127.0.0.1"


def says(word: str, release: asyncio.Event | None = None) -> Any:
    """An app with one answer, to a /slow request once it is released."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if release is not None and scope["path"] == "/slow":
            await release.wait()
        headers = [(b"content-length", str(len(word)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": word.encode()})

    return app


def test_clients_move_to_whoever_shares_the_port_and_no_request_is_lost() -> None:
    async def scenario() -> None:
        port = free_port()
        release, seen = asyncio.Event(), Counter[str]()
        old, new = Listener(says("old", release), HOST, port), None
        async with httpx.AsyncClient(base_url=f"http://{HOST}:{port}") as client:
            assert (await client.get("/")).text == "old"
            slow = asyncio.create_task(client.get("/slow"))
            while not old.requests_under_way:
                await asyncio.sleep(0)
            new = Listener(says("new"), HOST, port)
            closing = asyncio.create_task(old.close(5.0))
            while seen["new"] < 100:
                seen[(await client.get("/")).text] += 1
            assert not closing.done()  # somebody still waits for an answer
            release.set()
            answer = await slow
            assert (answer.text, answer.headers["connection"]) == ("old", "close")
            await closing
            assert (await client.get("/")).text == "new"
        await new.close(0.0)
        with pytest.raises(httpx.ConnectError):
            async with httpx.AsyncClient() as client:
                await client.get(f"http://{HOST}:{port}/")

    asyncio.run(scenario())


def test_a_port_that_somebody_has_alone_is_refused() -> None:
    with shared_socket(HOST, 0) as taken:
        port = taken.getsockname()[1]
        taken.listen()
        shared_socket(HOST, port).close()  # whoever asks in the same way may share it

    with socket.socket() as alone:
        alone.bind((HOST, 0))
        alone.listen()
        with pytest.raises(OSError, match="in use"):
            shared_socket(HOST, alone.getsockname()[1])


class Full:
    """A source without room."""

    def check_room(self) -> None:
        raise Busy(7)

    async def draw(self, request: Any) -> AsyncGenerator[Any, None]:
        raise AssertionError("nobody gets here")
        yield


@asynccontextmanager
async def raw(port: int) -> Any:
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        yield reader, writer
    finally:
        writer.close()


def test_a_full_server_refuses_before_anything_is_read(tmp_path: Path) -> None:
    """Its answer comes though the body never does, and the key is asked for all the same."""

    async def scenario() -> None:
        port = free_port()
        sampler = tiny_models(tmp_path, rows=8).sampler()
        app = build_app(
            Full(), model_of(sampler), Access(AccessSettings()), host_numbers_requests=False
        )
        listener = Listener(app, HOST, port)
        for path in ("generations", "edits"):
            async with raw(port) as (reader, writer):
                writer.write(
                    f"POST /v1/images/{path} HTTP/1.1\r\nHost: localhost\r\n"
                    "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{".encode()
                )
                head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)).decode()
                assert head.startswith("HTTP/1.1 429")
                assert "retry-after: 7" in head.lower()
                length = int(head.lower().partition("content-length: ")[2].partition("\r")[0])
                error = json.loads(await reader.readexactly(length))["error"]
                assert error["code"] == "server_busy"
        async with httpx.AsyncClient(base_url=f"http://localhost:{port}") as client:
            assert (await client.get("/healthz")).status_code == 200
            assert (await client.get("/v1/models")).status_code == 200
        await listener.close(0.0)

    asyncio.run(scenario())
