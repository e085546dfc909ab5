"""The sampler behind HTTP: routes, envelopes, limits; the app as a server runs it, without Ray."""

import asyncio
import base64
import dataclasses
import io
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi import FastAPI
from PIL import Image

from pipelines.sampling.access import AccessSettings
from pipelines.sampling.api import BODY_BYTES
from pipelines.sampling.batching import Batch
from pipelines.sampling.engine import Sampler
from pipelines.sampling.picture_source import ServingLimits
from tests.fixtures import http_server
from tests.fixtures.models import TinyModels, tiny_models

URL = "/v1/images/generations"


class Gate:
    """Stands before every step of a batch, so that a test knows what is going on meanwhile."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.entered, self.let_on = threading.Semaphore(0), threading.Event()
        self.let_on.set()
        self.steps = 0
        http_server.before_steps(patch, self._pass)

    def _pass(self, batch: Batch) -> None:
        self.entered.release()
        assert self.let_on.wait(60)
        self.steps += 1


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return tiny_models(tmp_path_factory.mktemp("models"), rows=8)


@pytest.fixture
def sampler(models: TinyModels) -> Sampler:
    plain = models.sampler()
    return Sampler(plain.prior, plain.dvae, plain.tokenizer, max_candidates=2)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.let_on.set()


def app_of(sampler: Sampler, **limits: Any) -> FastAPI:
    app: FastAPI = http_server.app_of(sampler, ServingLimits(**limits), AccessSettings(hosts=()))
    return app


def client_of(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def ask(app: FastAPI, method: str, url: str, **request: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with client_of(app) as client:
            return await client.request(method, url, **request)

    return asyncio.run(send())


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status
    assert answer.headers["x-request-id"].startswith("req_")
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text
    return error


def test_pictures_come_back_and_each_can_be_had_again_by_its_seed(sampler: Sampler) -> None:
    app = app_of(sampler)
    answer = ask(app, "POST", URL, json={"prompt": "red apple", "n": 2, "seed": 3})
    assert answer.status_code == 200
    assert answer.headers["x-request-id"].startswith("req_")
    data = answer.json()["data"]
    assert data[0]["b64_json"] != data[1]["b64_json"]
    again = ask(app, "POST", URL, json={"prompt": "red apple", "seed": data[1]["seed"]})
    assert again.json()["data"] == [data[1]]
    picture = Image.open(io.BytesIO(base64.b64decode(data[0]["b64_json"])))
    assert np.array_equal(np.asarray(picture), sampler.generate("red apple", seed=3)[0])


def test_without_a_seed_every_request_gets_another_one(sampler: Sampler) -> None:
    app = app_of(sampler)
    seeds = {
        ask(app, "POST", URL, json={"prompt": "dog"}).json()["data"][0]["seed"] for _ in range(3)
    }
    assert len(seeds) == 3


def test_models_and_health_are_told(sampler: Sampler) -> None:
    app = app_of(sampler)
    card = ask(app, "GET", "/v1/models/manray").json()
    wanted = {"id": "manray", "object": "model", "created": 1, "owned_by": "manray"}
    assert wanted.items() <= card.items()
    assert card["manray"]["edits"]
    assert ask(app, "GET", "/v1/models").json() == {"object": "list", "data": [card]}
    assert ask(app, "GET", "/readyz").json() == {"status": "ready"}
    assert ask(app, "GET", "/metrics").text == ""
    assert ask(app, "GET", "/healthz").json() == {"status": "ok", "model": "manray"}
    assert error_of(ask(app, "GET", "/v1/models/x/y"), 404)["code"] == "model_not_found"


def test_wrong_routes_methods_and_bodies_are_answered_in_the_envelope(
    sampler: Sampler,
    gate: Gate,
) -> None:
    app = app_of(sampler)
    assert error_of(ask(app, "GET", "/nope"), 404)["code"] == "not_found"
    assert error_of(ask(app, "GET", "/docs"), 404)["code"] == "not_found"
    answer = ask(app, "GET", URL)
    assert error_of(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "POST"
    json_type = {"content-type": "application/json; charset=utf-8"}
    error_of(ask(app, "POST", URL, content=b"{", headers=json_type), 400)
    error = error_of(ask(app, "POST", URL, json={"prompt": "dog", "n": "two"}), 400)
    assert error["param"] == "n"
    error = error_of(ask(app, "POST", URL, json={"prompt": "q " * 40}), 400)
    assert (error["param"], error["code"]) == ("prompt", "invalid_prompt")
    assert "at most 15 tokens" in error["message"]
    surrogate = b'{"prompt": "\\ud800"}'
    error = error_of(ask(app, "POST", URL, content=surrogate, headers=json_type), 400)
    assert error["param"] == "prompt"
    assert gate.steps == 0


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_what_a_foreign_web_page_could_post_is_refused(sampler: Sampler, media_type: str) -> None:
    answer = ask(
        app_of(sampler),
        "POST",
        URL,
        content=b'{"prompt": "dog"}',
        headers={"content-type": media_type},
    )
    assert error_of(answer, 415)["code"] == "unsupported_media_type"


def test_a_body_beyond_the_cap_is_refused_whatever_its_length_claims(
    sampler: Sampler,
) -> None:
    app = app_of(sampler)
    large = b'{"prompt": "' + b"a" * BODY_BYTES + b'"}'
    headers = {"content-type": "application/json"}
    assert error_of(ask(app, "POST", URL, content=large, headers=headers), 413)

    async def drip() -> AsyncIterator[bytes]:
        for start in range(0, len(large), 1000):
            yield large[start : start + 1000]

    answer = ask(app, "POST", URL, content=drip(), headers=headers)
    assert error_of(answer, 413)["code"] == "body_too_large"
    short = {**headers, "content-length": "20"}
    error_of(ask(app, "POST", URL, content=large, headers=short), 413)


def test_a_full_queue_is_answered_at_once_with_429_and_when_to_come_back(
    sampler: Sampler,
    gate: Gate,
) -> None:
    gate.let_on.clear()

    async def crowd() -> tuple[list[httpx.Response], list[httpx.Response]]:
        async with client_of(app_of(sampler, max_waiting=1, retry_after_seconds=7)) as client:
            accepted = [
                asyncio.create_task(client.post(URL, json={"prompt": "dog", "seed": seed}))
                for seed in range(3)
            ]
            await asyncio.to_thread(gate.entered.acquire)  # two are drawn, or will be; one waits
            await asyncio.sleep(0.2)  # for the others to have come
            turned_away = [await client.post(URL, json={"prompt": "cat"}) for _ in range(3)]
            assert (await client.get("/healthz")).status_code == 200
            gate.let_on.set()
            answers = list(await asyncio.gather(*accepted))
            answers.append(await client.post(URL, json={"prompt": "cat"}))
            return answers, turned_away

    answers, turned_away = asyncio.run(crowd())
    assert [answer.status_code for answer in answers] == [200, 200, 200, 200]
    for answer in turned_away:
        assert error_of(answer, 429)["code"] == "server_busy"
        assert answer.headers["retry-after"] == "7"


def test_the_deadline_ends_waiting_and_sampling_and_no_header_lifts_it(
    sampler: Sampler,
    gate: Gate,
) -> None:
    gate.let_on.clear()
    headers = {"x-request-timeout-seconds": "0", "x-request-disconnect-disabled": "?1"}

    async def late() -> list[httpx.Response]:
        async with client_of(app_of(sampler, deadline_seconds=0.3)) as client:
            first = asyncio.create_task(client.post(URL, json={"prompt": "a"}, headers=headers))
            await asyncio.to_thread(gate.entered.acquire)
            second = asyncio.create_task(client.post(URL, json={"prompt": "b"}, headers=headers))
            await asyncio.sleep(0.4)  # the deadline passes
            gate.let_on.set()
            return [await first, await second]

    for answer in asyncio.run(late()):
        assert error_of(answer, 504)["code"] == "deadline_exceeded"
        assert answer.headers["x-should-retry"] == "false"
    assert gate.steps <= 2


def test_a_client_that_leaves_frees_its_place(sampler: Sampler, gate: Gate) -> None:
    gate.let_on.clear()

    async def leave() -> httpx.Response:
        async with client_of(app_of(sampler, max_waiting=0)) as client:
            gone = asyncio.create_task(client.post(URL, json={"prompt": "dog", "n": 10}))
            await asyncio.to_thread(gate.entered.acquire)
            gone.cancel()
            await asyncio.wait({gone})
            gate.let_on.set()
            while True:  # until the thread has seen that nobody waits
                answer = await client.post(URL, json={"prompt": "cat"})
                if answer.status_code != 429:
                    return answer

    assert asyncio.run(leave()).status_code == 200
    assert 64 <= gate.steps <= 64 + 2  # all of the second request's, one or two of the first


def test_a_broken_model_is_a_500_and_never_a_grey_picture(sampler: Sampler) -> None:
    with torch.no_grad():
        sampler.prior.row_position[3].fill_(torch.nan)
    app = app_of(sampler)
    answer = ask(app, "POST", URL, json={"prompt": "dog"})
    assert error_of(answer, 500)["code"] == "model_error"
    assert answer.headers["x-should-retry"] == "false"


def test_an_unforeseen_error_tells_the_client_nothing_but_its_number(
    sampler: Sampler, caplog: pytest.LogCaptureFixture
) -> None:
    app = app_of(sampler)
    sampler.dvae.decoder = torch.nn.Identity()  # type: ignore[assignment]
    answer = ask(app, "POST", URL, json={"prompt": "dog"})
    error = error_of(answer, 500)
    assert error["code"] == "internal_error"
    assert answer.headers["x-request-id"] in error["message"]
    assert "Identity" not in answer.text
    assert "Identity" in caplog.text
    assert answer.headers["x-request-id"] in caplog.text


@pytest.mark.parametrize(
    ("field", "value"), [("deadline_seconds", 0), ("max_waiting", -1), ("retry_after_seconds", -1)]
)
def test_impossible_limits_are_refused_by_name(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(ServingLimits(), **{field: value})
