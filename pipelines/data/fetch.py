"""The guarded fetch: bytes of a public picture, or a reason why not.

URL lists are written by strangers, and this runs inside somebody's network. So: http and https
only, only public addresses (see addresses.py), each redirect through the same door, certificates
checked, a cap on bytes and deadlines. Proxies of the environment, cookies and credentials are never
used.
"""

import asyncio
import socket
import ssl
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import aiohttp
from yarl import URL

from pipelines.data.addresses import (
    ForbiddenAddress,
    PublicResolver,
    Resolve,
    checked_socket_factory,
    forbidden,
    system_resolve,
)
from pipelines.data.causes import may_pass, retry_after_seconds
from pipelines.data.url_vetting import AGENT, Refused, check_opt_out, parse_url, vet_url

REDIRECTS = frozenset({301, 302, 303, 307, 308})
CHUNK_BYTES = 1 << 16

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """How to fetch. The paper does not say; the defaults suit lists of many millions of hosts."""

    timeout_s: float = 15.0
    """Seconds for one try from the first packet to the last byte, redirects included."""
    total_s: float = 60.0
    """Seconds for a URL with all its tries and the waits between them; turns do not count."""
    max_bytes: int = 20 * 1024 * 1024
    """Bytes after which a body is given up."""
    max_redirects: int = 3
    retries: int = 2
    """Further tries of what may pass: see `causes.PASSING`; nothing else is tried again."""
    backoff_s: float = 0.5
    """Seconds before the first retry, doubled for each further one; Retry-After may ask for more,
    and ends the tries if it asks for more than total_s leaves."""
    concurrency: int = 64
    """Open requests per worker; at most this many bodies are in memory."""
    per_host: int = 16
    """Open requests per worker and host, those that redirects lead to included."""
    ports: tuple[int, ...] = (80, 443)
    """Ports of public hosts that may be asked."""
    allow_loopback: bool = False
    """Also fetch from this machine (127.0.0.0/8, ::1) on any port: for trials and tests."""

    def __post_init__(self) -> None:
        for name in ("timeout_s", "total_s", "max_bytes", "concurrency", "per_host"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("max_redirects", "retries", "backoff_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """`body` if `reason` is empty; else why there is none.

    Details hold nothing that varies by run, because they are part of the dataset's digest.
    """

    body: bytes = b""
    reason: str = ""
    detail: str = ""


def fetch_all(
    urls: Sequence[str],
    config: FetchConfig,
    handle: Callable[[Fetched], T],
    resolve: Resolve | None = None,
) -> list[T]:
    """Fetch all URLs and give back what `handle` makes of each, in the order of the URLs.

    `handle` runs in one thread, one picture at a time, while others are being fetched. A bad URL is
    a Fetched with a reason, never an exception; what `handle` raises ends the whole at once.
    `resolve` may be replaced: tests rebind names.
    """
    return asyncio.run(_fetch_all(urls, config, handle, resolve or system_resolve))


async def _fetch_all(
    urls: Sequence[str], config: FetchConfig, handle: Callable[[Fetched], T], resolve: Resolve
) -> list[T]:
    check = partial(forbidden, ports=config.ports, allow_loopback=config.allow_loopback)
    loop = asyncio.get_running_loop()
    # Names are looked up in threads; the standard six would be what a list of many hosts waits for.
    loop.set_default_executor(ThreadPoolExecutor(max_workers=config.concurrency))
    connector = aiohttp.TCPConnector(
        resolver=PublicResolver(check, resolve),
        socket_factory=checked_socket_factory(check),
        limit=config.concurrency,
    )
    session = aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        auto_decompress=False,  # pictures are compressed: an encoded body is a bomb or a fault
        headers={
            "User-Agent": f"Mozilla/5.0 (compatible; {AGENT})",
            "Accept": "image/webp,image/png,image/jpeg,image/gif;q=0.9",
            "Accept-Encoding": "identity",
        },
        timeout=aiohttp.ClientTimeout(total=None),  # ours spans redirects
    )
    with ThreadPoolExecutor(max_workers=1) as thread:
        async with session:
            fetcher = _Fetcher(config, session, check, partial(_in_thread, thread, handle))
            tasks = [asyncio.create_task(fetcher.fetch(url)) for url in urls]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:  # only if one raised are there any left
                    task.cancel()


async def _in_thread(
    thread: ThreadPoolExecutor, handle: Callable[[Fetched], T], fetched: Fetched
) -> T:
    return await asyncio.get_running_loop().run_in_executor(thread, handle, fetched)


class _Fetcher(Generic[T]):
    """The turns that the URLs of one call share, and the way of one of them."""

    def __init__(
        self,
        config: FetchConfig,
        session: aiohttp.ClientSession,
        check: Callable[[str, int], str | None],
        handle: Callable[[Fetched], Awaitable[T]],
    ) -> None:
        self._config, self._session, self._check, self._handle = config, session, check, handle
        self._slots = asyncio.Semaphore(config.concurrency)
        self._host_slots: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(config.per_host)
        )

    async def fetch(self, url: str) -> T:
        """All tries of a URL."""
        config, left = self._config, self._config.total_s
        for attempt in range(config.retries + 1):
            clock = _Clock(min(config.timeout_s, left))
            try:
                return await self._follow(url, clock)
            except Refused as error:
                refusal = error
            wait = max(config.backoff_s * 2**attempt, refusal.retry_after_s)
            left -= clock.spent + wait
            if not may_pass(refusal.reason) or attempt == config.retries or left <= 0:
                break
            await asyncio.sleep(wait)  # without a turn: others go on
        return await self._handle(Fetched(reason=refusal.reason, detail=refusal.detail))

    async def _follow(self, text: str, clock: "_Clock") -> T:
        """One try; raises Refused."""
        url = parse_url(text)
        for _ in range(self._config.max_redirects + 1):
            host = vet_url(url, self._check)
            # Turns are waited for off the clock: a queue at a busy host is no reason for a timeout.
            async with self._host_slots[host], self._slots:
                answer = await self._ask(url, clock)
                if isinstance(answer, bytes):
                    return await self._handle(Fetched(body=answer))
            url = answer
        raise Refused("too_many_redirects", f"more than {self._config.max_redirects}")

    async def _ask(self, url: URL, clock: "_Clock") -> bytes | URL:
        """The body, or where it is said to be; raises Refused for every way in which it fails."""
        try:
            with clock:
                async with asyncio.timeout(clock.left):
                    return await self._get(url)
        except TimeoutError as error:
            raise Refused("timeout") from error
        except aiohttp.InvalidURL as error:
            raise Refused("bad_url", "refused by the client") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise _connection_failure(error) from error

    async def _get(self, url: URL) -> bytes | URL:
        async with self._session.get(url, allow_redirects=False) as response:
            check_opt_out(response.headers.getall("X-Robots-Tag", []))
            if response.status in REDIRECTS:
                return parse_url(response.headers.get("Location", ""), base=url)
            return await _read(response, self._config.max_bytes)


class _Clock:
    """Seconds that one try has spent with hosts, and has left."""

    def __init__(self, seconds: float) -> None:
        self.left, self.spent = seconds, 0.0

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        seconds = time.monotonic() - self._started
        self.left, self.spent = self.left - seconds, self.spent + seconds


async def _read(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    if response.status != 200:
        asked = retry_after_seconds(response.headers.get("Retry-After", ""))
        raise Refused(f"http_{response.status}", retry_after_s=asked)
    if (response.content_length or 0) > max_bytes:
        raise Refused("too_many_bytes", f"more than {max_bytes}")
    body = bytearray()
    async for chunk in response.content.iter_chunked(CHUNK_BYTES):
        body += chunk
        if len(body) > max_bytes:
            raise Refused("too_many_bytes", f"more than {max_bytes}")
    if not body:
        raise Refused("empty_body")
    return bytes(body)


def _connection_failure(error: Exception) -> Refused:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ForbiddenAddress):
            return Refused("forbidden_address", str(cause))
        if isinstance(cause, ssl.SSLError | aiohttp.ClientSSLError):
            return Refused("tls_failed", type(cause).__name__)
        if isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_AGAIN:
            return Refused("dns_failed")
        if isinstance(cause, socket.gaierror | UnicodeError):
            return Refused("unknown_host")
        cause = getattr(cause, "os_error", None) or cause.__cause__
    return Refused("connection_failed", type(error).__name__)
