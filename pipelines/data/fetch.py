"""The guarded fetch: bytes of a public picture, or a reason why not.

URL lists are written by strangers, and this runs inside somebody's network. So: http and https
only, only public addresses (see addresses.py), each redirect through the same door, a cap on bytes
and a deadline. Proxies of the environment, cookies and credentials are never used.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

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

AGENT = "manray"
# What img2dataset honours too: the owner does not want the picture used for training or indexed.
OPT_OUT = frozenset({"noai", "noimageai", "noindex", "noimageindex"})
REDIRECTS = frozenset({301, 302, 303, 307, 308})
CHUNK_BYTES = 1 << 16
MAX_URL_LENGTH = 2083

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """How to fetch. The paper does not say; the defaults suit lists of many millions of hosts."""

    timeout_s: float = 15.0
    """Seconds for one try from the first packet to the last byte, redirects included."""
    max_bytes: int = 20 * 1024 * 1024
    """Bytes after which a body is given up."""
    max_redirects: int = 3
    retries: int = 2
    """Further tries after a timeout or a 5xx; nothing else is tried again."""
    backoff_s: float = 0.5
    """Seconds before the first retry, doubled for each further one."""
    concurrency: int = 64
    """Open requests per worker; at most this many bodies are in memory."""
    per_host: int = 16
    """Open requests per worker and host."""
    ports: tuple[int, ...] = (80, 443)
    """Ports of public hosts that may be asked."""
    allow_loopback: bool = False
    """Also fetch from this machine (127.0.0.0/8, ::1) on any port: for trials and tests."""

    def __post_init__(self) -> None:
        for name in ("timeout_s", "max_bytes", "concurrency", "per_host"):
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


class Refused(Exception):
    """One URL is given up; carries what goes into its row."""

    def __init__(self, reason: str, detail: str = "", *, again: bool = False) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail, self.again = reason, detail, again


def fetch_all(
    urls: Sequence[str],
    config: FetchConfig,
    handle: Callable[[Fetched], T],
    resolve: Resolve | None = None,
) -> list[T]:
    """Fetch all URLs and give back what `handle` makes of each, in the order of the URLs.

    `handle` runs in one thread, one picture at a time, while others are being fetched. A bad URL is
    a Fetched with a reason, never an exception. `resolve` may be replaced: tests rebind names.
    """
    return asyncio.run(_fetch_all(urls, config, handle, resolve or system_resolve))


async def _fetch_all(
    urls: Sequence[str], config: FetchConfig, handle: Callable[[Fetched], T], resolve: Resolve
) -> list[T]:
    slots = asyncio.Semaphore(config.concurrency)
    host_slots: dict[str, asyncio.Semaphore] = {}
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

    async def one(url: str) -> T:
        host = host_slots.setdefault(_host(url), asyncio.Semaphore(config.per_host))
        # Turns are waited for out here: a queue at a busy host is no reason for a timeout.
        async with host, slots:
            return await loop.run_in_executor(thread, handle, await _fetch(session, url, config))

    with ThreadPoolExecutor(max_workers=1) as thread:
        async with session:
            return list(await asyncio.gather(*(one(url) for url in urls)))


async def _fetch(session: aiohttp.ClientSession, url: str, config: FetchConfig) -> Fetched:
    for attempt in range(config.retries + 1):
        try:
            async with asyncio.timeout(config.timeout_s):
                return Fetched(body=await _follow(session, _parse(url), config))
        except Refused as refusal:
            failure = refusal
        except TimeoutError:
            failure = Refused("timeout", f"{config.timeout_s:g} s", again=True)
        except aiohttp.InvalidURL:
            failure = Refused("bad_url", "refused by the client")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            failure = _connection_failure(error)
        if not failure.again or attempt == config.retries:
            break
        await asyncio.sleep(config.backoff_s * 2**attempt)
    return Fetched(reason=failure.reason, detail=failure.detail)


async def _follow(session: aiohttp.ClientSession, url: URL, config: FetchConfig) -> bytes:
    for _ in range(config.max_redirects + 1):
        _vet(url, config)
        async with session.get(url, allow_redirects=False) as response:
            _check_opt_out(response.headers.getall("X-Robots-Tag", []))
            if response.status not in REDIRECTS:
                return await _read(response, config)
            target = response.headers.get("Location", "")
            url = _parse(target, base=url)
    raise Refused("too_many_redirects", f"more than {config.max_redirects}")


async def _read(response: aiohttp.ClientResponse, config: FetchConfig) -> bytes:
    if response.status != 200:
        raise Refused(f"http_{response.status}", again=response.status >= 500)
    if (response.content_length or 0) > config.max_bytes:
        raise Refused("too_many_bytes", f"more than {config.max_bytes}")
    body = bytearray()
    async for chunk in response.content.iter_chunked(CHUNK_BYTES):
        body += chunk
        if len(body) > config.max_bytes:
            raise Refused("too_many_bytes", f"more than {config.max_bytes}")
    if not body:
        raise Refused("empty_body")
    return bytes(body)


def _host(url: str) -> str:
    try:
        return URL(url).host or ""
    except ValueError:
        return ""


def _parse(text: str, base: URL | None = None) -> URL:
    """A URL as aiohttp will read it; a relative one is taken from `base`."""
    if not text or len(text) > MAX_URL_LENGTH:
        raise Refused("bad_url", "empty" if not text else f"longer than {MAX_URL_LENGTH}")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        raise Refused("bad_url", "control characters")
    try:
        url = URL(text) if base is None else base.join(URL(text))
        url.port, url.host  # noqa: B018  # both are parsed only when asked for
    except (ValueError, UnicodeError) as error:
        raise Refused("bad_url", "cannot be parsed") from error
    return url


def _vet(url: URL, config: FetchConfig) -> None:
    """Refuse what can be seen without asking a name server."""
    if url.scheme not in ("http", "https"):
        raise Refused("forbidden_scheme", url.scheme or "none")
    if not url.host:
        raise Refused("bad_url", "no host")
    if url.user is not None or url.password is not None:
        raise Refused("bad_url", "credentials")
    try:
        ipaddress.ip_address(url.host.partition("%")[0])
    except ValueError:
        return  # a name, or a form such as 127.1 that only the resolver reads as an address
    port = url.port or 0
    why = forbidden(url.host, port, ports=config.ports, allow_loopback=config.allow_loopback)
    if why:
        raise Refused("forbidden_address", why)


def _check_opt_out(headers: Sequence[str]) -> None:
    """X-Robots-Tag: "noai, nofollow", or "agent: noai" which is for that agent only."""
    for header in headers:
        directives = header.lower()
        agent, colon, rest = directives.partition(":")
        if colon and "," not in agent:
            if agent.strip() != AGENT:
                continue
            directives = rest
        found = OPT_OUT & {word.strip() for word in directives.split(",")}
        if found:
            raise Refused("opted_out", ", ".join(sorted(found)))


def _connection_failure(error: Exception) -> Refused:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ForbiddenAddress):
            return Refused("forbidden_address", str(cause))
        if isinstance(cause, (socket.gaierror, UnicodeError)):
            return Refused("unknown_host")
        cause = getattr(cause, "os_error", None) or cause.__cause__
    return Refused("connection_failed", type(error).__name__)
