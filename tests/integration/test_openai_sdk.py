"""The official client of OpenAI, unchanged, against the real app over real HTTP."""

import asyncio
import base64
import io
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from pipelines.sampling.access import Access, AccessSettings
from pipelines.sampling.api import ImagesRequest
from pipelines.sampling.batching import Batch
from pipelines.sampling.diagnosis import NonFiniteLogits
from pipelines.sampling.engine import Sampler, Start
from pipelines.sampling.http_app import build_app
from pipelines.sampling.partial_pictures import GREY
from pipelines.sampling.picture_source import Busy, Item, PartialPicture, TooLate
from pipelines.sampling.rate_limits import RateLimits
from tests.fixtures.http_server import app_of, before_steps, model_of, serving
from tests.fixtures.models import tiny_models


class Brightness:
    """A reranker that prefers bright pictures, so that its order can be checked."""

    def scores(self, prompt: str, pictures: np.ndarray) -> np.ndarray:
        return pictures.mean((1, 2, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Sampler:
    return tiny_models(tmp_path_factory.mktemp("models"), rows=8).sampler()


@pytest.fixture(scope="module")
def url(sampler: Sampler) -> Iterator[str]:
    with serving(app_of(sampler, reranker=Brightness())) as url:
        yield url


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return client_of(url)


def client_of(url: str, **more: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", **({"max_retries": 0} | more))


def pixels_of(b64_json: str | None) -> np.ndarray:
    assert b64_json is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json))).convert("RGB"))


def file_of(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_pictures_usage_and_the_same_again_by_seed(client: openai.OpenAI, sampler: Sampler) -> None:
    answer = client.images.generate(
        prompt="red apple",
        model="manray",
        n=2,
        size="64x64",
        quality="auto",
        background="auto",
        moderation="auto",
        response_format="b64_json",
        user="somebody",
        extra_body={"seed": 3, "temperature": 0.9, "top_k": 100, "top_p": 0.9, "cond_scale": 1},
    )
    assert answer.data is not None
    assert [item.seed for item in answer.data] == [3, 4]  # type: ignore[attr-defined]
    assert [item.score for item in answer.data] == [None, None]  # type: ignore[attr-defined]
    assert (answer.size, answer.output_format) == ("64x64", "png")
    assert answer.safety_identifier == "somebody"
    assert answer.usage is not None
    assert answer.usage.output_tokens == 128
    assert answer.usage.total_tokens == 128 + answer.usage.input_tokens
    alone = client.images.generate(
        prompt="red apple", extra_body={"seed": 4, "temperature": 0.9, "top_k": 100, "top_p": 0.9}
    )
    assert alone.data is not None
    assert alone.data[0].b64_json == answer.data[1].b64_json


def test_a_pool_is_ranked_best_first_and_paid_as_drawn(
    client: openai.OpenAI, sampler: Sampler
) -> None:
    answer = client.images.generate(prompt="dog", n=2, extra_body={"seed": 0, "rerank_pool": 12})
    assert answer.data is not None
    (samples,) = sampler.sample(["dog"], n=12, seed=0)
    best = sorted(samples, key=lambda sample: -float(sample.pixels.mean()))[:2]
    assert [item.seed for item in answer.data] == [s.seed for s in best]  # type: ignore[attr-defined]
    for item, sample in zip(answer.data, best, strict=True):
        assert item.score == pytest.approx(sample.pixels.mean())  # type: ignore[attr-defined]
        assert np.array_equal(pixels_of(item.b64_json), sample.pixels)
    assert answer.usage is not None
    assert answer.usage.output_tokens == 12 * 64


@pytest.mark.parametrize(("wanted", "kind"), [("png", "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG")])
def test_formats(client: openai.OpenAI, wanted: Any, kind: str) -> None:
    def ask(quality: int) -> bytes:
        more: dict[str, Any] = {} if wanted == "png" else {"output_compression": quality}
        answer = client.images.generate(
            prompt="dog", output_format=wanted, extra_body={"seed": 1}, **more
        )
        assert answer.data is not None
        assert answer.data[0].b64_json is not None
        return base64.b64decode(answer.data[0].b64_json)

    assert Image.open(io.BytesIO(ask(90))).format == kind
    if wanted != "png":
        assert len(ask(10)) < len(ask(100))


def test_a_stream_shows_the_rows_so_far_and_then_the_pictures(
    client: openai.OpenAI, sampler: Sampler
) -> None:
    stream = client.images.generate(
        prompt="red apple", n=2, stream=True, partial_images=3, extra_body={"seed": 7}
    )
    events: list[Any] = list(stream)
    partials, completed = events[:6], events[6:]
    wanted = sampler.sample(["red apple"], n=2, seed=7)[0]
    for event in partials:
        assert event.type == "image_generation.partial_image"
        assert event.rows == 2 * event.partial_image_index + 1
        assert event.seed == 7 + event.index
        edge = event.rows * 8
        pixels = pixels_of(event.b64_json)
        assert (pixels[edge:] == GREY).all()
        raster = torch.from_numpy(wanted[event.index].tokens).view(8, 8).clone()
        raster[event.rows :] = raster[event.rows - 1]
        so_far = sampler.decode(raster.view(1, 64))[0]
        assert np.array_equal(pixels[:edge], so_far[:edge])
    assert [(event.index, event.partial_image_index) for event in partials] == [
        (index, moment) for moment in range(3) for index in range(2)
    ]
    for event, sample in zip(completed, wanted, strict=True):
        assert event.type == "image_generation.completed"
        assert (event.seed, event.score, event.size) == (sample.seed, None, "64x64")
        assert np.array_equal(pixels_of(event.b64_json), sample.pixels)
    whole = client.images.generate(prompt="red apple", n=2).usage
    assert whole is not None
    for name in ("input_tokens", "output_tokens", "total_tokens"):
        assert sum(getattr(e.usage, name) for e in completed) == getattr(whole, name)


def test_an_edit_keeps_the_upper_rows_and_draws_the_rest(
    client: openai.OpenAI, sampler: Sampler
) -> None:
    original = sampler.generate("dog", seed=5)[0]
    mask = np.full((64, 64, 4), 255, np.uint8)
    mask[24:, :, 3] = 0
    answer = client.images.edit(
        image=("dog.png", file_of(original)),
        mask=("mask.png", file_of(mask)),
        prompt="red apple",
        n=2,
        output_format="png",
        extra_body={"seed": 9},
    )
    start = sampler.first_rows(original, 3)
    wanted = sampler.sample(["red apple"], n=2, seed=9, start=Start(tokens=start))[0]
    assert answer.data is not None
    for item, sample in zip(answer.data, wanted, strict=True):
        assert np.array_equal(pixels_of(item.b64_json), sample.pixels)
    assert answer.usage is not None
    assert answer.usage.input_tokens_details.image_tokens == 24
    assert answer.usage.output_tokens == 2 * 40


def test_an_edit_is_streamed(client: openai.OpenAI, sampler: Sampler) -> None:
    stream = client.images.edit(
        image=[("dog.png", file_of(sampler.generate("dog")[0]))],
        prompt="red apple",
        stream=True,
        partial_images=1,
        extra_body={"seed": 9, "keep_rows": 4},
    )
    events: list[Any] = list(stream)
    partial, completed = events
    assert partial.type == "image_edit.partial_image"
    assert partial.rows == 5
    assert completed.type == "image_edit.completed"


def test_the_model_is_listed_with_what_may_be_asked_of_it(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, model.owned_by) == ("manray", "manray")
    assert model.manray["size"] == "64x64"  # type: ignore[attr-defined]
    assert client.models.retrieve("manray") == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("dall-e-3")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("param", "more"),
    [
        ("n", {"n": 11}),
        ("size", {"size": "1024x1024"}),
        ("quality", {"quality": "hd"}),
        ("background", {"background": "transparent"}),
        ("moderation", {"moderation": "low"}),
        ("response_format", {"response_format": "url"}),
        ("output_format", {"output_format": "gif"}),
        ("output_compression", {"output_compression": 50}),
        ("partial_images", {"partial_images": 2}),
        ("partial_images", {"stream": True, "partial_images": 4}),
        ("style", {"style": "vivid"}),
        ("complexity", {"extra_body": {"complexity": "low"}}),
        ("cond_scale", {"extra_body": {"cond_scale": 3}}),
        ("rerank_pool", {"extra_body": {"rerank_pool": 17}}),
        ("rerank_pool", {"n": 5, "extra_body": {"rerank_pool": 4}}),
        ("top_p", {"extra_body": {"top_p": 0}}),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_name(
    client: openai.OpenAI, param: str, more: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="dog", **more)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id


@dataclass
class Moody:
    """A source that misbehaves as it is told, and counts who came."""

    errors: list[Exception] = field(default_factory=list)
    after: list[PartialPicture] = field(default_factory=list)
    calls: int = 0

    def check_room(self) -> None:
        """There is always room."""

    async def draw(self, request: ImagesRequest) -> AsyncGenerator[Item, None]:
        self.calls += 1
        for item in self.after:
            yield item
        raise self.errors.pop(0)


def test_the_client_comes_back_as_told_when_the_server_is_busy(sampler: Sampler) -> None:
    source = Moody([Busy(0.1), Busy(0.1), Busy(0.1)])
    app = build_app(
        source, model_of(sampler), Access(AccessSettings()), host_numbers_requests=False
    )
    with serving(app) as url:
        started = time.monotonic()
        with pytest.raises(openai.RateLimitError) as caught:
            client_of(url, max_retries=2).images.generate(prompt="dog")
    assert source.calls == 3
    assert time.monotonic() - started >= 2  # Retry-After is whole seconds, and obeyed
    assert caught.value.code == "server_busy"


def test_a_broken_model_is_not_asked_again_and_an_error_within_a_stream_is_raised(
    sampler: Sampler,
) -> None:
    broken = NonFiniteLogits("layer 3")
    source = Moody([broken, broken], [])
    app = build_app(
        source, model_of(sampler), Access(AccessSettings()), host_numbers_requests=False
    )
    with serving(app) as url:
        client = client_of(url, max_retries=2)
        with pytest.raises(openai.InternalServerError) as whole:
            client.images.generate(prompt="dog")
        assert (whole.value.code, source.calls) == ("model_error", 1)
        source.after.append(PartialPicture(0, 4, np.zeros((64, 64, 3), np.uint8)))
        stream = client.images.generate(prompt="dog", stream=True, partial_images=1)
        assert next(stream).type == "image_generation.partial_image"
        with pytest.raises(openai.APIError) as streamed:
            next(stream)
    assert streamed.value.code == "model_error"
    assert "layer 3" not in str(streamed.value)


def test_pictures_that_were_not_drawn_are_given_back(sampler: Sampler) -> None:
    source = Moody([Busy(0.1), Busy(0.1)])
    rate = RateLimits(pictures_per_minute=1, burst=10)
    app = build_app(
        source, model_of(sampler), Access(AccessSettings(rate=rate)), host_numbers_requests=False
    )
    with serving(app) as url:
        for _ in range(2):
            with pytest.raises(openai.RateLimitError) as caught:
                client_of(url).images.generate(prompt="dog", n=10)
            assert caught.value.code == "server_busy"
    assert source.calls == 2


def test_limits_that_cannot_be_asked_let_nobody_draw(sampler: Sampler) -> None:
    class Broken:
        async def take(self, holder: str, pictures: int) -> float:
            raise ConnectionError("the actor at 10.0.0.7 is gone")

        async def give_back(self, holder: str, pictures: int) -> None: ...

    source = Moody()
    access = Access(AccessSettings(), Broken())
    app = build_app(source, model_of(sampler), access, host_numbers_requests=False)
    with serving(app) as url, pytest.raises(openai.InternalServerError) as caught:
        client_of(url).images.generate(prompt="dog")
    assert (caught.value.status_code, caught.value.code) == (503, "limits_unreadable")
    assert "10.0.0.7" not in str(caught.value)
    assert source.calls == 0


def test_a_stream_says_that_it_is_there_and_then_how_it_failed(sampler: Sampler) -> None:
    @dataclass
    class Late(Moody):
        async def draw(self, request: ImagesRequest) -> AsyncGenerator[Item, None]:
            await asyncio.sleep(0.3)
            raise TooLate
            yield []

    access = Access(AccessSettings(keep_alive_seconds=0.05))
    app = build_app(Late(), model_of(sampler), access, host_numbers_requests=False)
    with serving(app) as url:
        body = {"prompt": "dog", "stream": True}
        text = httpx.post(f"{url}/v1/images/generations", json=body).text
        with pytest.raises(openai.APIError) as caught:
            list(client_of(url).images.generate(prompt="dog", stream=True))
    comment, *_, error, end = text.split("\n\n")
    assert comment == ": still drawing"
    assert error.startswith("event: error\n")
    assert end == ""
    assert caught.value.code == "deadline_exceeded"


def test_a_stream_that_is_closed_ends_the_drawing_within_one_step(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy: list[int] = []

    def slowly(batch: Batch) -> None:
        busy.append(batch.busy_slots)
        time.sleep(0.02)

    before_steps(monkeypatch, slowly)
    with serving(app_of(sampler)) as url:
        client = client_of(url)
        stream = client.images.generate(prompt="dog", n=4, stream=True, partial_images=3)
        next(stream)
        stream.close()
        assert client.images.generate(prompt="cat").data
    # The four were gone, but for the moment that a connection takes, when the one was drawn.
    assert busy.count(4) < 64 // 4 + 10
    assert busy.count(1) >= 64 - 10
