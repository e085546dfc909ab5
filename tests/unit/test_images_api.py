"""The Images API's requests and answers, without a server."""

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.sampling.api import Delivery, ImagesRequest, ServedModel, parse_request
from pipelines.sampling.drawing import ALL_CODES, LARGEST_SEED, SamplingConfig
from pipelines.sampling.engine import Sample
from pipelines.sampling.model_card import model_card
from pipelines.sampling.openai_answers import render_response
from pipelines.sampling.openai_errors import ApiError
from pipelines.sampling.picture_source import RankedPicture


def check_prompt(prompt: str) -> int:
    """One token a word, at most five."""
    words = len(prompt.split())
    if not 1 <= words <= 5:
        raise ValueError(f"prompt must have 1 to 5 words, got {words}")
    return words


MODEL = ServedModel(
    name="manray",
    created=1_700_000_000,
    image_size=64,
    image_tokens=64,
    vocab_size=128,
    check_prompt=check_prompt,
)


def parse(body: bytes | dict[str, Any]) -> ImagesRequest:
    return parse_whole(body)[0]


def parse_whole(body: bytes | dict[str, Any]) -> tuple[ImagesRequest, Delivery]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse_request(data, MODEL, lambda: 77)


def refused(body: bytes | dict[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(body)
    envelope = caught.value.envelope()
    assert set(envelope) == {"error"}
    assert set(envelope["error"]) == {"message", "type", "param", "code"}
    json.dumps(envelope, ensure_ascii=False).encode()  # an answer that can be sent
    return caught.value


def test_a_prompt_alone_is_a_request_with_defaults() -> None:
    assert parse({"prompt": "red apple"}) == ImagesRequest(
        prompt="red apple", prompt_tokens=2, n=1, seed=77, sampling=SamplingConfig()
    )


def test_every_field_is_taken_over() -> None:
    request = parse(
        {
            "prompt": "red apple",
            "model": "manray",
            "n": 10,
            "size": "64x64",
            "response_format": "b64_json",
            "user": "somebody",
            "seed": 0,
            "temperature": 2,
            "top_k": 128,
        }
    )
    assert (request.n, request.seed) == (10, 0)
    assert request.sampling == SamplingConfig(temperature=2.0, top_k=128)


def test_null_is_as_good_as_absent_but_for_the_prompt() -> None:
    names = ("model", "n", "size", "response_format", "user", "seed", "temperature", "top_k")
    assert parse({"prompt": "dog"} | dict.fromkeys(names)) == parse({"prompt": "dog"})
    assert parse({"prompt": "dog", "top_k": None}).sampling.top_k == ALL_CODES
    assert refused({"prompt": None}).param == "prompt"


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("prompt", 7),
        ("prompt", ["red apple"]),
        ("prompt", ""),
        ("prompt", "one two three four five six"),
        ("n", 0),
        ("n", -1),
        ("n", 11),
        ("n", 10**9),
        ("n", "two"),
        ("n", "1"),
        ("n", 1.5),
        ("n", 1.0),
        ("n", True),
        ("size", "256x256"),
        ("size", 64),
        ("response_format", "url"),
        ("seed", -1),
        ("seed", LARGEST_SEED + 1),
        ("seed", "0"),
        ("seed", False),
        ("temperature", 0),
        ("temperature", -1.0),
        ("temperature", 10**400),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", 0),
        ("top_k", 129),
        ("top_k", ALL_CODES),
        ("top_k", 3.5),
        ("user", 5),
        ("quality", "hd"),
        ("quality", "high"),
        ("background", "transparent"),
        ("moderation", "low"),
        ("output_format", "gif"),
        ("output_compression", 101),
        ("output_compression", 50),
        ("stream", "true"),
        ("stream", 1),
        ("partial_images", 1),
        ("partial_images", 4),
        ("top_p", 0),
        ("top_p", 1.1),
        ("cond_scale", 2),
        ("cond_scale", -1),
        ("cond_scale", 101),
        ("rerank_pool", 1),
        ("rerank_pool", -1),
        ("safety_identifier", "x" * 513),
        ("style", "vivid"),
        ("\ud800", 1),
        ("Prompt", "dog"),
    ],
)
def test_a_wrong_field_is_refused_by_name(param: str, value: Any) -> None:
    error = refused({"prompt": "red apple"} | {param: value})
    assert error.status == 400
    assert error.type == "invalid_request_error"
    assert error.param == param.encode(errors="backslashreplace").decode()


def test_another_model_is_not_found() -> None:
    error = refused({"prompt": "dog", "model": "dall-e-3"})
    assert (error.status, error.param, error.code) == (404, "model", "model_not_found")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"prompt=dog",
        b"[]",
        b'"dog"',
        b"null",
        b"3",
        b'{"prompt": "dog"',
        b'{"prompt": "dog"}}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "dog", "temperature": NaN}',
        b'{"prompt": "dog", "temperature": Infinity}',
        b'{"prompt": "dog", "n": ' + b"1" * 5000 + b"}",
        b'{"a":' * 10_000,
        b"[" * 60_000,
    ],
)
def test_what_is_no_flat_json_object_is_refused(body: bytes) -> None:
    assert refused(body).status == 400


def test_a_temperature_that_json_overflows_to_infinity_is_refused() -> None:
    assert refused(b'{"prompt": "dog", "temperature": 1e999}').param == "temperature"


def test_a_field_given_twice_is_refused() -> None:
    assert refused(b'{"prompt": "dog", "n": 1, "n": 2}').param == "n"


def test_a_body_of_very_many_fields_is_refused_at_once() -> None:
    body = "{" + ",".join(f'"{number:x}":1' for number in range(7_000)) + "}"
    assert refused(body.encode()).code == "unknown_parameter"


def test_the_answer_has_the_pictures_their_seeds_and_the_tokens_used() -> None:
    request = parse({"prompt": "red apple", "n": 2, "seed": 5})
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    samples = [
        RankedPicture(Sample(pixels[i], np.zeros(64, np.int64), seed=5 + i), score=None)
        for i in range(2)
    ]
    answer = render_response(request, Delivery(), MODEL, samples, created=123)
    for entry, wanted in zip(answer["data"], pixels, strict=True):
        picture = Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))
        assert picture.format == "PNG"
        assert np.array_equal(np.asarray(picture), wanted)
    assert [entry["seed"] for entry in answer["data"]] == [5, 6]
    assert (answer["created"], answer["size"], answer["output_format"]) == (123, "64x64", "png")
    assert answer["usage"]["input_tokens"] == 2
    assert answer["usage"]["output_tokens"] == 128
    assert answer["usage"]["total_tokens"] == 130


def test_the_card_says_what_the_file_notes_at_a_length_that_a_page_can_bear() -> None:
    config = {"n_layers": 3, "n_heads": 2, "d_model": 32, "grid": 8, "image_vocab_size": 8192}
    header = {
        "config": config | {"text_len": 16},
        "metadata": {
            "tokens_digest": "0123456789abcdef" * 4,
            "training": {"steps": 3000},
            "corpus": "<b>" * 1000,
        },
    }
    card = model_card(header, "4f3c", "tiny")
    assert {"Preset": "tiny", "Step": "3000", "Run": "4f3c"}.items() <= card.items()
    assert card["Training data"] == "sha256 0123456789ab"
    assert card["Picture"] == "8 × 8 of 8,192 codes"
    assert len(card["Corpus"]) == 300
    assert "Run" not in model_card(header, "")
