"""Completing a picture: the form, the mask, and what is no picture."""

import dataclasses
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.sampling.api import ServedModel
from pipelines.sampling.multipart import MOST_PARTS, parse_multipart
from pipelines.sampling.openai_edits import MOST_PIXELS, begun, parse_edit
from pipelines.sampling.openai_errors import ApiError

TYPE = "multipart/form-data; boundary=xyz"


def first_rows(picture: np.ndarray, rows: int) -> np.ndarray:
    """Stands for the encoder: says what it was given."""
    assert picture.shape == (64, 64, 3)
    return np.full(rows * 8, picture[0, 0, 0], np.int64)


MODEL = ServedModel(
    name="manray",
    created=0,
    image_size=64,
    image_tokens=64,
    vocab_size=128,
    check_prompt=len,
    first_rows=first_rows,
)


def form(**fields: Any) -> bytes:
    """Texts, and files as bytes."""
    body = b""
    for name, value in fields.items():
        file = '; filename="x.png"' if isinstance(value, bytes) else ""
        body += f'--xyz\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode()
        body += (value if isinstance(value, bytes) else value.encode()) + b"\r\n"
    return body + b"--xyz--\r\n"


def picture(side: int = 64, clear_from: int | None = None, value: int = 9) -> bytes:
    """A grey square as PNG, transparent from a row on."""
    pixels = np.full((side, side, 4), value, np.uint8)
    pixels[..., 3] = 255
    if clear_from is not None:
        pixels[clear_from:, :, 3] = 0
    return file_of(pixels)


def file_of(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def start_of(**fields: Any) -> np.ndarray:
    edit = parse_edit(parse_multipart(TYPE, form(**fields)), MODEL, lambda: 7)
    start = begun(edit, MODEL).start
    assert start is not None
    return start


def refused(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        start_of(**fields)
    assert caught.value.status == 400
    return caught.value


def test_a_form_is_taken_over_with_its_types() -> None:
    parts = parse_multipart(
        TYPE, form(image=picture(), prompt="dog", n="3", seed="5", stream="true", top_p="0.5")
    )
    edit = parse_edit(parts, MODEL, lambda: 7)
    assert (edit.request.n, edit.request.seed, edit.delivery.stream) == (3, 5, True)
    assert edit.request.sampling.top_p == 0.5
    assert edit.image == picture()


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("n", {"n": "0"}),
        ("n", {"n": "1.0"}),
        ("n", {"n": "1e0"}),
        ("n", {"n": ""}),
        ("n", {"n": "٣"}),
        ("n", {"n": "9" * 500}),
        ("temperature", {"temperature": "nan"}),
        ("temperature", {"temperature": "inf"}),
        ("temperature", {"temperature": "1e999"}),
        ("stream", {"stream": "1"}),
        ("keep_rows", {"keep_rows": "0"}),
        ("keep_rows", {"keep_rows": "8"}),
        ("keep_rows", {"keep_rows": "4", "mask": picture(clear_from=8)}),
        ("input_fidelity", {"input_fidelity": "high"}),
        ("markup", {"markup": "x"}),
        ("image", {"image[]": picture()}),
        ("prompt", {"prompt": b"dog"}),
    ],
)
def test_a_wrong_field_of_a_form_is_refused_by_name(param: str, fields: dict[str, Any]) -> None:
    assert refused(**({"image": picture(), "prompt": "dog"} | fields)).param == param


def test_what_must_be_there_is_named() -> None:
    assert refused(prompt="dog").param == "image"
    assert refused(image=picture()).param == "prompt"


def test_without_a_word_half_of_the_picture_is_kept() -> None:
    assert np.array_equal(start_of(image=picture(), prompt="dog"), np.full(32, 9))
    assert len(start_of(image=picture(), prompt="dog", keep_rows="7")) == 56


@pytest.mark.parametrize(("top", "rows"), [(8, 1), (15, 1), (16, 2), (63, 7)])
def test_all_that_is_transparent_is_drawn(top: int, rows: int) -> None:
    masked = start_of(image=picture(), mask=picture(clear_from=top), prompt="dog")
    assert len(masked) == 8 * rows
    assert len(start_of(image=picture(clear_from=top), prompt="dog")) == 8 * rows


def test_a_picture_of_another_size_is_scaled_and_its_mask_with_it() -> None:
    start = start_of(image=picture(200), mask=picture(200, clear_from=100), prompt="dog")
    assert np.array_equal(start, np.full(32, 9))


def hole() -> bytes:
    pixels = np.full((64, 64, 4), 255, np.uint8)
    pixels[20:40, 20:40, 3] = 0
    return file_of(pixels)


def left_half() -> bytes:
    pixels = np.full((64, 64, 4), 255, np.uint8)
    pixels[:, :32, 3] = 0
    return file_of(pixels)


def upper_half() -> bytes:
    pixels = np.full((64, 64, 4), 255, np.uint8)
    pixels[:32, :, 3] = 0
    return file_of(pixels)


@pytest.mark.parametrize(
    "mask",
    [
        hole(),
        left_half(),
        upper_half(),
        picture(clear_from=0),
        picture(clear_from=7),
        picture(),
        picture(32, clear_from=16),
        file_of(np.zeros((64, 64, 3), np.uint8)),
        b"",
        b"\x89PNG\r\n\x1a\n",
        picture(clear_from=32)[:-30],
    ],
)
def test_an_area_that_is_no_lower_band_is_refused(mask: bytes) -> None:
    error = refused(image=picture(), mask=mask, prompt="dog")
    assert (error.param, error.code) == ("mask", "invalid_image")


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises more pixels than it has bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", body), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    "image",
    [
        b"",
        b"GIF89a",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.4",
        bomb(65_535, 65_535),
        bomb(4097, MOST_PIXELS // 4096),
        bomb(64, 64),
        picture()[:100],
        file_of(np.zeros((64, 65, 3), np.uint8)),
    ],
)
def test_what_is_no_usable_picture_is_refused(image: bytes) -> None:
    error = refused(image=image, prompt="dog")
    assert (error.param, error.code) == ("image", "invalid_image")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--xyz--\r\n",
        b"hello",
        b"--abc\r\n",
        form(prompt="dog")[:-6],
        form(prompt="dog") + b"more",
        b"junk" + form(prompt="dog"),
        b"--xyz\r\nno header\r\n--xyz--\r\n",
        b"--xyz\r\nContent-Disposition: form-data\r\n\r\nx\r\n--xyz--\r\n",
        b'--xyz\r\nContent-Disposition: attachment; name="a"\r\n\r\nx\r\n--xyz--\r\n',
        b'--xyz\r\n\xff: form-data; name="a"\r\n\r\nx\r\n--xyz--\r\n',
        b'--xyz\r\nContent-Disposition: form-data; name="a"\r\n'
        b"Content-Transfer-Encoding: base64\r\n\r\nx\r\n--xyz--\r\n",
        b"--xyz\r\n" * 100_000,
        b"".join(form(prompt="dog")[:-8] for _ in range(MOST_PARTS + 5)) + b"\r\n--xyz--",
    ],
)
def test_what_is_no_form_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_edit(parse_multipart(TYPE, body), MODEL, lambda: 7)
    assert caught.value.status == 400


def test_a_form_without_a_boundary_is_refused() -> None:
    with pytest.raises(ApiError, match="boundary"):
        parse_multipart("multipart/form-data", form(prompt="dog"))


def test_a_file_may_hold_whatever_is_not_its_boundary() -> None:
    data = bytes(range(256)) + b"\r\n--xy\r\n\r\n--\r\n"
    (part,) = parse_multipart(TYPE, form(image=data))
    assert (part.name, part.data, part.is_file) == ("image", data, True)


def test_a_server_without_an_encoder_says_so() -> None:
    model = dataclasses.replace(MODEL, first_rows=None)
    with pytest.raises(ApiError) as caught:
        parse_edit(parse_multipart(TYPE, form(image=picture(), prompt="dog")), model, lambda: 7)
    assert caught.value.code == "not_supported"
