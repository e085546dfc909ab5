"""The guarded fetch against a real server that misbehaves."""

import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import pytest

from pipelines.data.fetch import FetchConfig, Fetched, fetch_all

TRIAL = FetchConfig(allow_loopback=True, timeout_s=5, retries=1, backoff_s=0.01, max_bytes=100_000)
PUBLIC = FetchConfig(timeout_s=5, retries=0)


class EvilServer(ThreadingHTTPServer):
    """Answers by path; counts what was asked; `done` ends the slow answers."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: Counter[str] = Counter()
        self.done = threading.Event()

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server_address[1]}{path}"


class Answer(BaseHTTPRequestHandler):
    server: EvilServer

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        name = self.path.partition("?")[0].strip("/").replace("-", "_")
        getattr(self, f"answer_{name}", self.answer_missing)()

    def send(self, status: int = 200, body: bytes = b"picture", **headers: str) -> None:
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer_good(self) -> None:
        self.send()

    def answer_missing(self) -> None:
        self.send(404)

    def answer_broken(self) -> None:
        self.send(503)

    def answer_recovers(self) -> None:
        self.send(503 if self.server.asked[self.path] == 1 else 200)

    def answer_empty(self) -> None:
        self.send(body=b"")

    def answer_to(self) -> None:
        """/to?TARGET redirects there."""
        self.send(302, Location=unquote(self.path.partition("?")[2]))

    def answer_loop(self) -> None:
        self.send(301, Location="/loop")

    def answer_nowhere(self) -> None:
        self.send(302)

    def answer_opted_out(self) -> None:
        self.send(X_Robots_Tag="nofollow, NoImageAI")

    def answer_other_agent(self) -> None:
        self.send(X_Robots_Tag="otherbot: noai")

    def answer_this_agent(self) -> None:
        self.send(X_Robots_Tag="manray: noai")

    def answer_large(self) -> None:
        self.send(body=b"x" * 100_001)

    def answer_endless(self) -> None:
        """No length is announced, and it never stops."""
        self.send_response(200)
        self.end_headers()
        try:
            while not self.server.done.is_set():
                self.wfile.write(b"x" * 10_000)
        except ConnectionError:
            pass

    def answer_drip(self) -> None:
        """A byte now and then, so that no single read ever times out."""
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        try:
            while not self.server.done.wait(0.05):
                self.wfile.write(b"x")
                self.wfile.flush()
        except ConnectionError:
            pass

    def answer_hangs_up(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nshort")

    def answer_no_http(self) -> None:
        self.wfile.write(b"SSH-2.0-OpenSSH_9.9\r\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[EvilServer]:
    with EvilServer() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.done.set()
        server.shutdown()


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


def test_only_server_faults_and_timeouts_are_tried_again(server: EvilServer) -> None:
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


@pytest.mark.parametrize("field", ["timeout_s", "max_bytes", "concurrency", "per_host"])
def test_a_setting_of_nothing_is_refused(field: str) -> None:
    settings: dict[str, Any] = {field: 0}
    with pytest.raises(ValueError, match=f"{field} must be positive, got 0"):
        FetchConfig(**settings)
