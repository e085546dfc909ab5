"""Whatever a stranger may send, over real HTTP: OpenAI's envelope comes back, no harm is done."""

import gzip
import io
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from pipelines.sampling.access import AccessSettings
from pipelines.sampling.api import BODY_BYTES
from pipelines.sampling.batching import Batch
from pipelines.sampling.engine import Sampler
from pipelines.sampling.http_app import Operations
from pipelines.sampling.keys import add_key, remove_key
from pipelines.sampling.picture_source import ServingLimits
from pipelines.sampling.policies import PolicySettings
from pipelines.sampling.rate_limits import RateLimits
from tests.fixtures.http_server import app_of, before_steps, serving
from tests.fixtures.models import tiny_models

GENERATIONS = "/v1/images/generations"
PAGE_BYTES = 4096


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Sampler:
    return tiny_models(tmp_path_factory.mktemp("models"), rows=8).sampler()


@pytest.fixture(scope="module")
def url(sampler: Sampler) -> Iterator[str]:
    with serving(app_of(sampler, access=AccessSettings(body_seconds=0.5))) as url:
        yield url


def post(url: str, body: bytes | dict[str, Any], **headers: str) -> httpx.Response:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    sent = {"content-type": "application/json"} | named
    return httpx.post(url + GENERATIONS, content=data, headers=sent, timeout=30)


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"].startswith("req_")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "Traceback" not in answer.text
    assert ".py" not in answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 1000
    return error


def raw(url: str, request: bytes, patience: float = 10.0) -> bytes:
    """Bytes as they are, to the end of the connection or of the patience."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=patience) as connection:
        connection.sendall(request)
        answer = b""
        try:
            while chunk := connection.recv(65536):
                answer += chunk
        except TimeoutError:
            pass
        return answer


# --- keys ---------------------------------------------------------------------------------------


def test_without_a_valid_key_nothing_is_told_but_the_page_and_the_probes(
    sampler: Sampler, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    good, other = add_key(keys, "ann"), add_key(keys, "bob")
    metrics = Operations(metrics=_metrics)
    access = AccessSettings(keys=keys)
    with serving(app_of(sampler, access=access, operations=metrics)) as url:
        wrong = ["", "Bearer", "Bearer x", f"Basic {good}", good]
        wrong += [f"Bearer {good[:-1]}", f"Bearer {good} {good}", "Bearer " + "k" * 10_000]
        for header in wrong:
            for answer in (
                post(url, {"prompt": "dog"}, authorization=header),
                httpx.post(f"{url}/v1/images/edits", headers={"authorization": header}),
                httpx.get(f"{url}/v1/models", headers={"authorization": header}),
                httpx.get(f"{url}/metrics", headers={"authorization": header}),
            ):
                error = error_of(answer, 401)
                assert error["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
        assert error_of(post(url, {"prompt": "dog"}), 401)
        latin = raw(
            url,
            b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer \xff\xfe\x01\r\n"
            b"Connection: close\r\n\r\n",
        )
        assert latin.split(b" ")[1] in (b"400", b"401")
        for path in ("/", "/healthz", "/readyz"):
            assert httpx.get(url + path).status_code == 200
        bearer = {"authorization": f"Bearer {good}"}
        assert post(url, {"prompt": "dog"}, **bearer).status_code == 200
        assert httpx.get(f"{url}/metrics", headers=bearer).text == "manray_up 1\n"
        remove_key(keys, "ann")
        assert error_of(post(url, {"prompt": "dog"}, **bearer), 401)
        assert post(url, {"prompt": "dog"}, authorization=f"Bearer {other}").status_code == 200
        keys.write_text("broken")
        error = error_of(post(url, {"prompt": "dog"}, authorization=f"Bearer {other}"), 503)
        assert error["code"] == "keys_unreadable"


async def _metrics() -> str:
    return "manray_up 1\n"


def test_readiness_is_not_health(sampler: Sampler) -> None:
    async def loading() -> str:
        return "the model is being loaded"

    with serving(app_of(sampler, operations=Operations(not_ready=loading))) as url:
        answer = httpx.get(f"{url}/readyz")
        assert (answer.status_code, answer.json()["reason"]) == (503, "the model is being loaded")
        assert httpx.get(f"{url}/healthz").status_code == 200


# --- prompts and numbers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        " \t\n ",
        "a\0b",
        "\ud800",
        "dog \udfff",
        "\u200b" * 20,
        "e" + "\u0301" * 10_000,
        "q " * 10_000,
        "\U0001f468\u200d\U0001f469\u200d\U0001f467" * 100,
        "x" * 32_001,
        7,
        None,
        ["dog"],
        {"text": "dog"},
        True,
    ],
    ids=lambda prompt: repr(prompt)[:20],
)
def test_a_bad_prompt_is_refused_by_name_and_at_once(url: str, prompt: Any) -> None:
    started = time.monotonic()
    error = error_of(post(url, {"prompt": prompt}), 400)
    assert error["param"] == "prompt"
    assert time.monotonic() - started < 5  # the machine may be busy; unbounded work takes longer


@pytest.mark.parametrize("prompt", ["x" * 1_000_000, "\u0301" * 50_000])
def test_a_very_long_prompt_is_too_large_a_body(url: str, prompt: str) -> None:
    assert error_of(post(url, {"prompt": prompt}), 413)["code"] == "body_too_large"


@pytest.mark.parametrize("prompt", ["كلب", "dog\u202etac", "<script>alert(1)</script>", "' OR 1=1"])
def test_a_strange_prompt_is_a_prompt(url: str, prompt: str) -> None:
    answer = post(url, {"prompt": prompt})
    if answer.status_code != 200:  # the tiny tokenizer needs many tokens for some
        assert "at most 15 tokens" in error_of(answer, 400)["message"]


@pytest.mark.parametrize(
    ("param", "value"),
    [
        *(("n", value) for value in ("0", "-1", "11", "1000000000", '"1"', "true", "1.5", "[]")),
        *(("seed", value) for value in ("-1", "1e3", "9007199254740992", '"0"', "true")),
        *(("temperature", value) for value in ("0", "-0.0", "1e999", '"NaN"', "true", "{}")),
        *(("top_k", value) for value in ("0", "129", "-1", "8193", "1.0")),
        *(("top_p", value) for value in ("0", "1.0001", "-1", "1e-999", '"0.5"')),
        *(("partial_images", value) for value in ("-1", "4", "true", "1e0")),
        *(("output_compression", value) for value in ("-1", "101", "50.5")),
        ("stream", '"yes"'),
        ("stream", "0"),
        ("user", "7"),
        ("x" * 5000, "1"),
    ],
)
def test_a_bad_number_is_refused_by_name(url: str, param: str, value: str) -> None:
    body = f'{{"prompt": "dog", "stream": true, "{param}": {value}}}'
    if param == "stream":
        body = f'{{"prompt": "dog", "stream": {value}}}'
    error = error_of(post(url, body.encode()), 400)
    assert error["param"] == param[:64]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1" * 5000, "01", "0x1", "+1"])
def test_what_is_no_number_in_json_is_refused(url: str, number: str) -> None:
    error_of(post(url, f'{{"prompt": "dog", "n": {number}}}'.encode()), 400)


# --- bodies -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x00",
        b"\xff\xfe{\x00",
        b"null",
        b"[" * 60_000,
        b'{"a":' * 12_000,
        b'{"prompt":"dog","prompt":"cat"}',
        b'{"prompt": "dog"} trailing',
        b"\xef\xbb\xbf" + b'{"prompt": "dog"}',
        b'{"prompt": "\xed\xa0\x80"}',
    ],
)
def test_a_broken_body_is_refused(url: str, body: bytes) -> None:
    error_of(post(url, body), 400)


def test_a_packed_body_is_not_unpacked(url: str) -> None:
    bomb = gzip.compress(bytes(10_000_000))
    error = error_of(post(url, bomb, content_encoding="gzip"), 415)
    assert error["code"] == "unsupported_content_encoding"
    error_of(post(url, bomb), 400)


@pytest.mark.parametrize("name", ["n", "api-version", "stream"])
def test_a_parameter_in_the_address_is_not_ignored(url: str, name: str) -> None:
    answer = httpx.post(f"{url}{GENERATIONS}?{name}=1", json={"prompt": "dog"})
    assert error_of(answer, 400)["param"] == name


def head(length: str, *more: str) -> bytes:
    lines = [
        f"POST {GENERATIONS} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {length}",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def test_a_length_that_is_a_lie_costs_the_liar(url: str) -> None:
    body = b'{"prompt": "dog"}'
    more = raw(url, head("100", "Connection: close") + body)
    assert b" 408 " in more.split(b"\r\n")[0]
    assert b"body_too_slow" in more
    less = raw(url, head("10", "Connection: close") + body)
    assert b" 400 " in less.split(b"\r\n")[0]
    huge = raw(url, head("9" * 30, "Connection: close") + body)
    assert huge.split(b" ")[1] in (b"400", b"413")
    for length in ("-1", "x", "0x10"):
        assert raw(url, head(length) + body).split(b" ")[1] == b"400"
    assert httpx.get(f"{url}/healthz").status_code == 200


def test_a_slow_body_is_ended_and_holds_nobody_up(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    started = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=10) as slow:
        slow.sendall(head("1000") + b"{")
        assert post(url, {"prompt": "dog"}).status_code == 200
        answer = slow.recv(65536)
    assert b" 408 " in answer.split(b"\r\n")[0]
    assert time.monotonic() - started < 8


# --- headers ------------------------------------------------------------------------------------


def test_no_header_lifts_the_deadline(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    before_steps(monkeypatch, lambda batch: time.sleep(0.05))
    with serving(app_of(sampler, ServingLimits(deadline_seconds=0.3))) as url:
        started = time.monotonic()
        answer = post(
            url,
            {"prompt": "dog", "n": 1},
            x_request_timeout_seconds="0",
            x_request_disconnect_disabled="?1",
            x_stainless_timeout="9999",
        )
        assert error_of(answer, 504)["code"] == "deadline_exceeded"
        assert answer.headers["x-should-retry"] == "false"
        assert time.monotonic() - started < 3


def test_foreign_names_pages_and_origins_are_turned_away(url: str) -> None:
    body = {"prompt": "dog"}
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "x" * 5000):
        assert error_of(post(url, body, host=host), 421)["code"] == "unknown_host"
    assert error_of(httpx.get(f"{url}/", headers={"host": "evil.example"}), 421)
    for origin in ("http://evil.example", "null", "file://", "https://" + url[7:] + ".evil"):
        answer = post(url, body, origin=origin)
        assert error_of(answer, 403)["code"] == "foreign_origin"
        assert "access-control-allow-origin" not in answer.headers
    form = {"files": {"image": b"x"}, "headers": {"origin": "http://evil.example"}}
    assert error_of(httpx.post(f"{url}/v1/images/edits", **form), 403)  # type: ignore[arg-type]
    preflight = {"access-control-request-method": "POST", "origin": url}
    answer = httpx.options(url + GENERATIONS, headers=preflight)
    assert error_of(answer, 405)
    assert "access-control-allow-origin" not in answer.headers
    assert post(url, body, origin=url).status_code == 200


def test_a_name_of_a_user_cannot_become_a_header_or_a_line_of_the_log(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "manray.access")
    user = 'ann"\r\nX-Evil: 1\n{"status": 0}'
    answer = post(url, {"prompt": "secret words", "user": user, "n": 2})
    assert answer.status_code == 200
    assert "x-evil" not in answer.headers
    assert answer.json()["safety_identifier"] == user
    (line,) = (row.getMessage() for row in caplog.records if row.name == "manray.access")
    said = json.loads(line)
    assert "\n" not in line
    assert "secret" not in line
    assert "ann" not in line
    assert (said["status"], said["holder"], said["candidates"]) == (200, "anybody", 2)


# --- limits and policies over HTTP --------------------------------------------------------------


def refuse_white(prompt: str) -> str | None:
    return "Nothing white, please." if "white" in prompt else None


def fail(pixels: object) -> str | None:
    raise RuntimeError("the classifier is not there")


def test_a_key_that_has_had_its_pictures_is_told_when_to_come_back(sampler: Sampler) -> None:
    rate = RateLimits(pictures_per_minute=6, burst=4)
    with serving(app_of(sampler, access=AccessSettings(rate=rate))) as url:
        assert post(url, {"prompt": "dog", "n": 3}).status_code == 200
        answer = post(url, {"prompt": "dog", "n": 3})
        assert error_of(answer, 429)["code"] == "rate_limit_exceeded"
        assert 1 <= int(answer.headers["retry-after"]) <= 20
        assert error_of(post(url, {"prompt": "dog", "n": 5}), 400)["param"] == "n"
        assert post(url, {"prompt": "dog"}).status_code == 200


def test_the_same_key_is_answered_once_and_paid_once(sampler: Sampler) -> None:
    rate = RateLimits(pictures_per_minute=6, burst=1)
    with serving(app_of(sampler, access=AccessSettings(rate=rate))) as url:
        first = post(url, {"prompt": "dog"}, idempotency_key="k1")
        again = post(url, {"prompt": "dog"}, idempotency_key="k1")
        assert first.status_code == again.status_code == 200
        assert first.content == again.content
        error = error_of(post(url, {"prompt": "cat"}, idempotency_key="k1"), 400)
        assert error["code"] == "idempotency_key_reused"
        error = error_of(post(url, {"prompt": "dog", "stream": True}, idempotency_key="k2"), 400)
        assert error["code"] == "idempotency_key_with_stream"
        assert error_of(post(url, {"prompt": "dog"}, idempotency_key="k" * 5000), 400)


def test_a_form_that_is_sent_again_under_another_boundary_is_the_same(sampler: Sampler) -> None:
    file = io.BytesIO()
    Image.fromarray(sampler.generate("dog")[0]).save(file, "PNG")
    with serving(app_of(sampler)) as url:

        def edit(prompt: str) -> httpx.Response:
            return httpx.post(
                f"{url}/v1/images/edits",
                data={"prompt": prompt},
                files={"image": ("x.png", file.getvalue())},
                headers={"idempotency-key": "k"},
            )

        assert edit("dog").content == edit("dog").content
        assert error_of(edit("cat"), 400)["code"] == "idempotency_key_reused"


def test_a_dropped_connection_ends_the_drawing(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy: list[int] = []

    def slowly(batch: Batch) -> None:
        busy.append(batch.busy_slots)
        time.sleep(0.02)

    before_steps(monkeypatch, slowly)
    with serving(app_of(sampler)) as url:
        body = b'{"prompt": "dog", "n": 6}'
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(head(str(len(body))) + body)
            while 6 not in busy:
                time.sleep(0.01)
        assert post(url, {"prompt": "cat"}).status_code == 200
    assert busy.count(6) < 20
    assert busy.count(1) >= 64 - 10


@pytest.mark.parametrize("stream", [False, True])
def test_policies_refuse_and_fail_closed(sampler: Sampler, stream: bool) -> None:
    policies = PolicySettings(prompt=f"{__name__}:refuse_white")
    body = {"prompt": "a white dog", "stream": stream}
    with serving(app_of(sampler, access=AccessSettings(policies=policies))) as url:
        error = error_of(post(url, body), 400)
        assert (error["param"], error["code"]) == ("prompt", "content_policy_violation")
        assert error["message"] == "Nothing white, please."
        assert post(url, body | {"prompt": "dog"}).status_code == 200
    policies = PolicySettings(picture=f"{__name__}:fail")
    with serving(app_of(sampler, access=AccessSettings(policies=policies))) as url:
        answer = post(url, body | ({"partial_images": 2} if stream else {}))
        assert error_of(answer, 500)["code"] == "policy_failed"
        assert "b64_json" not in answer.text
        assert "classifier" not in answer.text


# --- memory -------------------------------------------------------------------------------------


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def test_memory_stays_flat_under_bad_input(url: str) -> None:
    bodies = [
        b"[" * BODY_BYTES,
        b'{"prompt": "' + b"\xcc\x81" * 15_000 + b'"}',
        b"{" + b",".join(b'"%d":1' % number for number in range(6000)) + b"}",
        b"x" * (4 * BODY_BYTES),
    ]
    with httpx.Client(base_url=url, headers={"content-type": "application/json"}) as client:

        def round_of(count: int) -> None:
            for number in range(count):
                body = bodies[number % len(bodies)]
                assert client.post(GENERATIONS, content=body).status_code in (400, 413)

        round_of(40)
        before = resident_bytes()
        round_of(120)
    assert resident_bytes() - before < 16 * 1024 * 1024
