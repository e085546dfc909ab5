"""The wall under fire: damaged URLs and pictures by the thousand; MANRAY_FUZZ=10000 for more."""

import io
import ipaddress
import os
import resource
import socket
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.data.fetch import FetchConfig, fetch_all
from pipelines.data.resize import ResizeConfig, resize_picture

ROUNDS = int(os.environ.get("MANRAY_FUZZ", "2000"))
CONFIG = ResizeConfig(short_side=64, max_pixels=4_000_000)
SECONDS_A_PICTURE = 3.0  # generous: a busy machine
MORE_MEMORY_KB = 400_000

dialled: list[str] = []
watching: list[bool] = []


def watch_dials(event: str, arguments: tuple[Any, ...]) -> None:
    """Notes every address that anything in this process dials, and lets none of them through."""
    if watching and event == "socket.connect" and isinstance(arguments[1], tuple):
        dialled.append(arguments[1][0])
        raise ConnectionRefusedError("a test reaches nobody")


@pytest.fixture
def dials() -> Iterator[list[str]]:
    if not dialled and not getattr(sys, "_manray_hooked", False):
        sys.addaudithook(watch_dials)  # can never be removed, only told to look away
        sys._manray_hooked = True  # type: ignore[attr-defined]
    dialled.clear()
    watching.append(True)
    yield dialled
    watching.clear()


def damaged_urls(port: int) -> list[str]:
    rng = np.random.default_rng(0)
    hosts = [
        "127.0.0.1", "127.1", "0x7f000001", "2130706433", "0177.0.0.1", "[::1]", "10.1",
        "[::ffff:10.0.0.1]", "[fe80::1]", "169.254.169.254", "100.64.0.1", "192.168.0.1",
        "localhost", "localhost.", "metadata.google.internal", "a@127.0.0.1", "x:y@10.0.0.1",
        "rebind.example", "xn--80ak6aa92e.com",
        "ⓛocalhost", "127。0。0。1", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "a" * 300,
    ]  # fmt: skip
    schemes = ["http://", "https://", "HTTP://", "http:/", "file://", "ftp://", "gopher://", "//"]
    letters = list("abc019.:/@[]%#?\\\t\n \x00é。-_x")
    urls = []
    for _ in range(ROUNDS):
        text = f"{rng.choice(schemes)}{rng.choice(hosts)}:{port}/p%2e?x=1"
        for _ in range(rng.integers(0, 4)):
            at = int(rng.integers(len(text)))
            text = text[:at] + str(rng.choice(letters)) + text[at + int(rng.integers(0, 2)) :]
        urls.append(text)
    return urls


def is_inner(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return not parsed.is_global


def test_no_damaged_url_reaches_an_inner_address_even_if_names_are_rebound(
    dials: list[str],
) -> None:
    rng = np.random.default_rng(1)
    answers: tuple[list[str], ...] = (
        ["93.184.216.34"],
        ["127.0.0.1"],
        ["93.184.216.34", "10.0.0.1"],
        ["::1"],
        [],
    )

    async def rebind(host: str, port: int) -> list[str]:
        """Numbers as the system reads them; names anew at every question."""
        try:
            return [socket.inet_ntoa(socket.inet_aton(host))]
        except (OSError, UnicodeError):
            return list(answers[int(rng.integers(len(answers)))])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        config = FetchConfig(ports=(80, 443, port), timeout_s=2, retries=0)
        started = time.monotonic()
        found = fetch_all(damaged_urls(port), config, lambda fetched: fetched.reason, rebind)
        assert len(found) == ROUNDS
        assert all(found)
        assert found.count("forbidden_address") > ROUNDS / 20
        assert dials  # those that were public were on their way
        assert not [address for address in dials if is_inner(address)]
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
        assert time.monotonic() - started < 0.02 * ROUNDS + 10


def test_the_watch_sees_a_dial_to_an_inner_address(dials: list[str]) -> None:
    """The check above could fail: with loopback allowed, the dial is seen."""
    config = FetchConfig(allow_loopback=True, timeout_s=2, retries=0)
    assert fetch_all(["http://127.0.0.1:9/"], config, lambda f: f.reason) == ["connection_failed"]
    assert dials == ["127.0.0.1"]


def encode(encoding: str, **options: Any) -> bytes:
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    pixels = (np.indices((72, 90)).sum(0)[..., None] + rng.integers(0, 60, (72, 90, 3))) % 256
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, encoding, **options)
    return buffer.getvalue()


def test_no_damaged_picture_crashes_lasts_or_swells() -> None:
    rng = np.random.default_rng(2)
    seeds = [
        encode("JPEG"), encode("JPEG", progressive=True), encode("PNG"), encode("GIF"),
        encode("WEBP"), encode("WEBP", lossless=True),
    ]  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    slowest = 0.0
    for number in range(ROUNDS):
        data = bytearray(seeds[number % len(seeds)])
        for _ in range(rng.integers(1, 8)):
            # Half of the damage is near the header, where sizes and tables are.
            limit = min(len(data), 64) if rng.integers(2) else len(data)
            data[int(rng.integers(limit))] = int(rng.integers(256))
        if rng.integers(4) == 0:
            del data[int(rng.integers(len(data))) :]
        started = time.monotonic()
        resized = resize_picture(bytes(data), CONFIG)
        slowest = max(slowest, time.monotonic() - started)
        assert bool(resized.image) != bool(resized.reason)
        assert "0x" not in resized.detail
    assert slowest < SECONDS_A_PICTURE
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MORE_MEMORY_KB


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(extra: bytes) -> bytes:
    whole = encode("PNG")
    return whole[:33] + extra + whole[33:]


def many_scans() -> bytes:
    """A progressive picture whose last scan comes again ten thousand times."""
    data = encode("JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * 10_000 + b"\xff\xd9"


def many_frames() -> bytes:
    frame = Image.new("P", (2, 2))
    buffer = io.BytesIO()
    frames = [Image.new("P", (2, 2), n % 2) for n in range(2000)]
    frame.save(buffer, "GIF", save_all=True, append_images=frames, loop=0)
    return buffer.getvalue()


BOMB = b"k\0\0" + zlib.compress(bytes(200_000_000), 9)


@pytest.mark.parametrize(
    ("make", "reasons"),
    [
        pytest.param(lambda: png_with(chunk(b"zTXt", BOMB)), ("", "broken_picture"), id="zTXt"),
        pytest.param(lambda: png_with(chunk(b"iCCP", BOMB)), ("", "broken_picture"), id="iCCP"),
        pytest.param(many_scans, ("broken_picture",), id="progressive JPEG with 10,000 scans"),
        pytest.param(many_frames, ("",), id="GIF with 2,000 frames"),
        pytest.param(lambda: encode("JPEG") + b"PK\x03\x04zip", ("",), id="polyglot JPEG+ZIP"),
        pytest.param(lambda: encode("TIFF"), ("not_a_picture",), id="TIFF renamed"),
        pytest.param(lambda: encode("BMP"), ("not_a_picture",), id="BMP renamed"),
        pytest.param(lambda: encode("EPS"), ("not_a_picture",), id="EPS renamed"),
        pytest.param(lambda: encode("PDF"), ("not_a_picture",), id="PDF renamed"),
        pytest.param(lambda: encode("JPEG2000"), ("not_a_picture",), id="JPEG 2000 renamed"),
    ],
)  # fmt: skip
def test_every_bomb_ends_soon_and_small(
    make: Callable[[], bytes], reasons: tuple[str, ...]
) -> None:
    data = make()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    assert resize_picture(data, CONFIG).reason in reasons
    assert time.monotonic() - started < SECONDS_A_PICTURE
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MORE_MEMORY_KB
