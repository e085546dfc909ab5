"""A proxy in front of an S3 server that does to requests what networks and stores do.

What happens to a request is a function of the plan's seed, of the request (its bucket and random
names left out) and of how often it has been asked: not of time, nor of the order of processes. One
connection carries one request.
"""

import asyncio
import contextlib
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from urllib.parse import urlsplit

RANDOM_NAME = re.compile(r"[0-9a-f]{32}")
MOST_HEAD_BYTES = 1 << 16
ERRORS = {
    "error_500": (500, "InternalError"),
    "error_503": (503, "ServiceUnavailable"),
    "slow_down": (503, "SlowDown"),
}
KINDS = (
    *ERRORS,
    "latency",  # the answer comes, but later
    "stall",  # the request goes nowhere, and no answer comes
    "late",  # so it seems, but it is done after the client has given up
    "reset",  # the connection breaks before anything is done
    "cut_request",  # the store gets a part of the body only, then the connection breaks
    "cut_answer",  # done, and a part of the answer comes
    "lost_answer",  # done, and the connection breaks before the answer
)


@dataclass(frozen=True, kw_only=True)
class FaultPlan:
    """What is done to requests."""

    seed: int = 0
    rates: Mapping[str, float] = field(default_factory=dict)
    """Probability of each kind; what is left of 1 passes untouched."""
    in_a_row: int = 4
    """Faults of one and the same request after which it passes."""
    after: int = 0
    """Requests that pass before the first fault."""
    latency_s: float = 0.05
    stall_s: float = 30.0
    """How long a client that does not give up by itself is kept waiting."""

    def __post_init__(self) -> None:
        if unknown := set(self.rates) - set(KINDS):
            raise ValueError(f"kinds must be among {', '.join(KINDS)}, got {sorted(unknown)}")
        if sum(self.rates.values()) > 1 + 1e-9:
            raise ValueError(f"rates must sum to at most 1, got {sum(self.rates.values())}")

    def draw(self, what: str, nth: int) -> tuple[str, float]:
        """The fault of a request when it is asked for the nth time, empty for none; a fraction."""
        rng = random.Random(f"{self.seed} {what} {nth}")
        dice = rng.random()
        for kind in KINDS:
            dice -= self.rates.get(kind, 0.0)
            if dice < 0:
                return kind, rng.random()
        return "", 1.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request as it came."""

    head: bytes
    body: bytes
    whole: bool
    """False if the client broke off within the body."""

    @property
    def method(self) -> str:
        return self.head.split(b" ", 1)[0].decode()

    @property
    def what(self) -> str:
        """Its name in all runs: neither the bucket nor names drawn at random are in it."""
        target = self.head.split(b" ", 2)[1].decode()
        return f"{self.method} {RANDOM_NAME.sub('*', re.sub('^/[^/?]+', '', target))}"


class FaultProxy:
    """Stands before `upstream` while the context is open; `plan` may be changed at any time."""

    def __init__(self, upstream: str, plan: FaultPlan | None = None) -> None:
        self._upstream = urlsplit(upstream)
        self.plan = plan or FaultPlan()
        self.counts: Counter[str] = Counter()
        """Requests by what was done to them; the untouched ones are `passed`."""
        self._asked: Counter[str] = Counter()
        self._in_a_row: Counter[str] = Counter()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def forget(self, plan: FaultPlan) -> None:
        """Go on with another plan as if nothing had been asked before."""
        self.plan = plan
        for counter in (self.counts, self._asked, self._in_a_row):
            counter.clear()

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        start = asyncio.start_server(self._serve, "127.0.0.1", 0, limit=MOST_HEAD_BYTES)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result()
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _decide(self, request: Request) -> tuple[str, float]:
        what = request.what
        self._asked[what] += 1
        kind, fraction = self.plan.draw(what, self._asked[what])
        if self._asked.total() <= self.plan.after or self._in_a_row[what] >= self.plan.in_a_row:
            kind = ""
        self._in_a_row[what] = self._in_a_row[what] + 1 if kind else 0
        self.counts[kind or "passed"] += 1
        return kind, fraction

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await _read_request(reader, writer)
            if not request.whole:
                await self._forward(request)
                return
            kind, fraction = self._decide(request)
            answer = await self._answer(request, kind, fraction, reader)
            if answer is None:
                _reset(writer)
            else:
                writer.write(answer)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass  # a client that is gone, or was killed before it had asked
        finally:
            writer.close()

    async def _answer(
        self, request: Request, kind: str, fraction: float, reader: asyncio.StreamReader
    ) -> bytes | None:
        """What the client hears; None: the connection breaks."""
        if kind in ERRORS:
            return _error(request.method, *ERRORS[kind])
        if kind == "latency":
            await asyncio.sleep(self.plan.latency_s)
        if kind in ("stall", "late"):
            await _until_gone(reader, self.plan.stall_s)
        if kind in ("reset", "stall"):
            return None
        if kind == "cut_request":
            part = request.body[: int(fraction * len(request.body))]
            await self._forward(Request(head=request.head, body=part, whole=False))
            return None
        answer = await self._forward(request)
        if kind == "cut_answer":
            return answer[: int(fraction * len(answer))]
        return None if kind in ("lost_answer", "late") else answer

    async def _forward(self, request: Request) -> bytes:
        """The store's answer; none to a request that is broken off."""
        address = self._upstream.hostname, self._upstream.port
        reader, writer = await asyncio.open_connection(*address)
        try:
            lines = request.head.split(b"\r\n")[:-2]
            kept = [line for line in lines if not line.lower().startswith(b"expect:")]
            writer.write(b"\r\n".join([*kept, b"Connection: close", b"", b""]) + request.body)
            await writer.drain()
            if request.whole:
                return await reader.read()
            _reset(writer)
            return b""
        finally:
            writer.close()


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request:
    head = await reader.readuntil(b"\r\n\r\n")
    fields = {
        name.strip().lower(): value.strip().lower()
        for name, _, value in (line.partition(b":") for line in head.split(b"\r\n")[1:])
    }
    if fields.get(b"expect") == b"100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    try:
        if fields.get(b"transfer-encoding") == b"chunked":
            body = await _read_chunks(reader)
        else:
            body = await reader.readexactly(int(fields.get(b"content-length", b"0")))
    except asyncio.IncompleteReadError as error:
        return Request(head=head, body=error.partial, whole=False)
    except ConnectionError:
        return Request(head=head, body=b"", whole=False)
    return Request(head=head, body=body, whole=True)


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    """As they came, their sizes included."""
    body = b""
    while True:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        body += line + await reader.readexactly(size + 2)
        if size == 0:
            return body


async def _until_gone(reader: asyncio.StreamReader, seconds: float) -> None:
    with contextlib.suppress(TimeoutError, ConnectionError):
        await asyncio.wait_for(reader.read(1), seconds)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Break the connection (RST), as a router does that has forgotten it."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _error(method: str, status: int, code: str) -> bytes:
    """As S3 says it; a HEAD is answered without words."""
    words = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>by test</Message></Error>"
    body = b"" if method == "HEAD" else words.encode()
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
