"""The guarded fetch against a real server that misbehaves."""

import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.causes import has_cause, parse_causes, retry_after_seconds
from pipelines.data.fetch import FetchConfig, Fetched, fetch_all
from tests.fixtures.evil_web import EvilServer, running_evil_web

TRIAL = FetchConfig(allow_loopback=True, timeout_s=5, retries=1, backoff_s=0.01, max_bytes=100_000)
PUBLIC = FetchConfig(timeout_s=5, retries=0)


@pytest.fixture
def server() -> Iterator[EvilServer]:
    with running_evil_web() as server:
        yield server


def fetch(url: str, config: FetchConfig = TRIAL) -> Fetched:
    (fetched,) = fetch_all([url], config, lambda fetched: fetched)
    return fetched


async def resolve_never(host: str, port: int) -> list[str]:
    raise AssertionError(f"{host} was looked up")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/good", ""),
        ("/none", "http_404"),
        ("/broken", "http_503"),
        ("/recovers", ""),
        ("/empty", "empty_body"),
        ("/to?/good", ""),
        ("/to?/to?/good", ""),
        ("/to?/to?/to?/to?/good", "too_many_redirects"),
        ("/to?file:///etc/passwd", "forbidden_scheme"),
        ("/to?ftp://example.com/x", "forbidden_scheme"),
        ("/to?http://10.0.0.1/", "forbidden_address"),
        ("/to?http://169.254.169.254/latest/meta-data", "forbidden_address"),
        ("/to?http://[fe80::1]/", "forbidden_address"),
        ("/to?http://user:pw@127.0.0.1/", "bad_url"),
        ("/loop", "too_many_redirects"),
        ("/nowhere", "bad_url"),
        ("/opted-out", "opted_out"),
        ("/other-agent", ""),
        ("/this-agent", "opted_out"),
        ("/large", "too_many_bytes"),
        ("/endless", "too_many_bytes"),
        ("/hangs-up", "connection_failed"),
        ("/no-http", "connection_failed"),
    ],
)
def test_every_answer_is_bytes_or_a_reason(server: EvilServer, path: str, reason: str) -> None:
    fetched = fetch(server.url(path))
    assert fetched.reason == reason
    assert fetched.body == (b"" if reason else b"picture")


def test_a_slow_drip_ends_at_the_deadline_and_is_tried_again_once(server: EvilServer) -> None:
    config = FetchConfig(allow_loopback=True, timeout_s=0.3, retries=1, backoff_s=0)
    assert fetch(server.url("/drip"), config).reason == "timeout"
    assert server.asked["/drip"] == 2


def test_only_what_may_pass_is_tried_again(server: EvilServer) -> None:
    for path in ("/broken", "/none", "/large", "/opted-out"):
        fetch(server.url(path))
    assert server.asked == {"/broken": 2, "/none": 1, "/large": 1, "/opted-out": 1}


@pytest.mark.parametrize(
    ("url", "reasons"),
    [
        ("http://127.0.0.1/", {"forbidden_address"}),
        ("http://127.1/", {"forbidden_address", "bad_url"}),
        ("http://0x7f000001/", {"forbidden_address", "bad_url"}),
        ("http://2130706433/", {"forbidden_address", "bad_url"}),
        ("http://0177.0.0.1/", {"forbidden_address", "bad_url"}),
        ("http://0/", {"forbidden_address", "bad_url"}),
        ("http://[::1]/", {"forbidden_address"}),
        ("http://[::]/", {"forbidden_address"}),
        ("http://[::ffff:127.0.0.1]/", {"forbidden_address"}),
        ("http://[::ffff:10.0.0.1]/", {"forbidden_address"}),
        ("http://[64:ff9b::a00:1]/", {"forbidden_address"}),
        ("http://[2002:a00:1::]/", {"forbidden_address"}),
        ("http://[fe80::1]/", {"forbidden_address"}),
        ("http://[fe80::1%25eth0]/", {"forbidden_address", "bad_url"}),
        ("http://[fd00::1]/", {"forbidden_address"}),
        ("http://[ff02::1]/", {"forbidden_address"}),
        ("http://169.254.169.254/latest/meta-data", {"forbidden_address"}),
        ("http://100.64.0.1/", {"forbidden_address"}),
        ("http://10.1/", {"forbidden_address", "bad_url"}),
        ("http://192.168.1.1/", {"forbidden_address"}),
        ("http://224.0.0.1/", {"forbidden_address"}),
        ("http://255.255.255.255/", {"forbidden_address"}),
        ("http://8.8.8.8:22/", {"forbidden_address"}),
        ("http://localhost/", {"forbidden_address"}),
        ("http://localhost./", {"forbidden_address", "unknown_host"}),
        ("http://ⓛocalhost/", {"forbidden_address", "bad_url"}),
        ("http://a@127.0.0.1/", {"bad_url"}),
        ("http://example.com@127.0.0.1/", {"bad_url"}),
        ("http://127.0.0.1\\@example.com/", {"bad_url", "forbidden_address"}),
        ("http://exam\tple.com/", {"bad_url"}),
        ("http://example.com/\r\nHost: x", {"bad_url"}),
        ("http://example.com\n", {"bad_url"}),
        ("http://" + "a" * 300 + ".example/", {"bad_url", "unknown_host"}),
        ("http://example.com/" + "a" * 3000, {"bad_url"}),
        ("http://example.com:99999/", {"bad_url"}),
        ("http://[::1", {"bad_url"}),
        ("http:///x.jpg", {"bad_url"}),
        ("", {"bad_url"}),
        ("no url at all", {"forbidden_scheme", "bad_url"}),
        ("file:///etc/passwd", {"forbidden_scheme"}),
        ("data:image/png;base64,iVBORw0KGgo=", {"forbidden_scheme"}),
        ("ftp://example.com/x.jpg", {"forbidden_scheme"}),
        ("gopher://127.0.0.1:6379/_FLUSHALL", {"forbidden_scheme", "bad_url"}),
        ("//example.com/x.jpg", {"forbidden_scheme"}),
    ],
)
def test_what_is_not_public_is_never_asked(url: str, reasons: set[str]) -> None:
    assert fetch(url, PUBLIC).reason in reasons


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["169.254.169.254"],
        ["93.184.216.34", "10.0.0.1"],
        ["2606:2800:220:1::", "::1"],
        ["93.184.216.34", "::ffff:192.168.0.1"],
    ],
)
def test_a_name_with_any_address_that_is_not_public_is_refused(addresses: list[str]) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return addresses

    (fetched,) = fetch_all(
        ["http://metadata.google.internal/"], PUBLIC, lambda fetched: fetched, resolve
    )
    assert fetched.reason == "forbidden_address"


def test_the_address_that_was_checked_is_the_one_that_is_dialled(server: EvilServer) -> None:
    """A rebinding name server answers well once, and with an inner address ever after."""
    answers = [["127.0.0.1"]]

    async def rebind(host: str, port: int) -> list[str]:
        return answers.pop() if answers else ["10.0.0.1"]

    url = server.url("/good", host="rebind.example")
    (fetched,) = fetch_all([url], TRIAL, lambda fetched: fetched, rebind)
    assert fetched.body == b"picture"
    assert not answers
    (fetched,) = fetch_all([url], TRIAL, lambda fetched: fetched, rebind)
    assert fetched.reason == "forbidden_address"


def test_a_refused_url_costs_no_look_up() -> None:
    urls = ["file:///etc/passwd", "http://a:b@example.com/", "http://10.0.0.1/"]
    assert all(f.reason for f in fetch_all(urls, PUBLIC, lambda f: f, resolve_never))


def test_proxies_of_the_environment_are_not_used(
    server: EvilServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetch(server.url("/good")).body == b"picture"


def test_answers_come_in_the_order_of_the_urls_whatever_is_slow(server: EvilServer) -> None:
    paths = ["/recovers", "/good", "/none", "/good", "/broken", "/to?/good"] * 5
    found = fetch_all([server.url(path) for path in paths], TRIAL, lambda fetched: fetched)
    expected = ["" if path in ("/recovers", "/good", "/to?/good") else "lost" for path in paths]
    assert ["lost" if fetched.reason else "" for fetched in found] == expected


def test_a_wait_that_the_host_asks_for_is_kept_if_the_total_allows(server: EvilServer) -> None:
    started = time.monotonic()
    assert fetch(server.url("/later?1")).body == b"picture"
    assert time.monotonic() - started >= 1
    started = time.monotonic()
    assert fetch(server.url("/later?3600")).reason == "http_429"
    assert time.monotonic() - started < 1
    assert server.asked == {"/later?1": 2, "/later?3600": 1}


def test_the_total_time_of_a_url_is_bounded_whatever_its_tries(server: EvilServer) -> None:
    config = FetchConfig(allow_loopback=True, timeout_s=0.3, total_s=0.7, retries=50, backoff_s=0)
    assert fetch(server.url("/drip"), config).reason == "timeout"
    assert 2 <= server.asked["/drip"] <= 4


def test_a_host_that_many_redirects_lead_to_is_asked_by_few_at_once(server: EvilServer) -> None:
    config = replace(TRIAL, per_host=2)
    targets = [server.url(f"/busy?{n}") for n in range(8)]
    urls = [server.url(f"/to?{url}", host=f"host-{n}.example") for n, url in enumerate(targets)]

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    found = fetch_all(urls, config, lambda fetched: fetched, resolve)
    assert [fetched.reason for fetched in found] == [""] * 8
    assert server.most_at_once <= 2


@pytest.mark.parametrize(
    ("errno", "reason", "asked"),
    [(socket.EAI_AGAIN, "dns_failed", 2), (socket.EAI_NONAME, "unknown_host", 1)],
)
def test_a_resolver_that_is_busy_is_asked_again_a_missing_name_is_not(
    errno: int, reason: str, asked: int
) -> None:
    calls = []

    async def resolve(host: str, port: int) -> list[str]:
        calls.append(host)
        raise socket.gaierror(errno, "no")

    (fetched,) = fetch_all(["http://a.example/"], TRIAL, lambda fetched: fetched, resolve)
    assert (fetched.reason, len(calls)) == (reason, asked)


def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*make, *files], check=True, capture_output=True)
    context.load_cert_chain(certificate, key)
    with EvilServer() as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.start()
        url = server.url("/good").replace("http://", "https://")
        assert fetch(url).reason == "tls_failed"
        server.shutdown()
    assert not server.asked


@pytest.mark.parametrize("header", ["", "soon", "-5", "Wed, 99 Foo", "9" * 40, "\x00"])
def test_a_retry_after_that_says_nothing_is_nothing(header: str) -> None:
    assert retry_after_seconds(header) == 0


def test_a_retry_after_may_be_a_date() -> None:
    assert retry_after_seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert retry_after_seconds("Fri, 21 Oct 2155 07:28:00 GMT") > 1e9


def test_causes_are_named_as_people_name_them() -> None:
    assert parse_causes("timeout, 5xx,dns") == ("5xx", "dns", "timeout")
    assert has_cause("http_503", ["5xx"])
    assert has_cause("http_404", ["http_404"])
    assert not has_cause("http_404", ["5xx", "timeout", "http_403"])
    for text in ("", "dsn", "dns,.*"):
        with pytest.raises(ValueError, match="retry_failed must name"):
            parse_causes(text)


@pytest.mark.parametrize("field", ["timeout_s", "total_s", "max_bytes", "concurrency", "per_host"])
def test_a_setting_of_nothing_is_refused(field: str) -> None:
    settings: dict[str, Any] = {field: 0}
    with pytest.raises(ValueError, match=f"{field} must be positive, got 0"):
        FetchConfig(**settings)
