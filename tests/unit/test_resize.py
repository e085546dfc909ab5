"""Decoding what strangers send: a picture or a reason, never a crash and never a bomb."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.data.resize import ResizeConfig, resize_picture

CONFIG = ResizeConfig(short_side=64, encoding="png")


def photo(width: int = 200, height: int = 120) -> Image.Image:
    """Smooth colours with some noise, so that every format has something to compress."""
    rng = np.random.default_rng(0)
    grid = np.indices((height, width)).sum(0)[..., None] * np.array([1, 2, 3]) % 256
    return Image.fromarray((grid + rng.integers(0, 8, grid.shape)).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, encoding: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, encoding, **options)
    return buffer.getvalue()


def decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def png_header(width: int, height: int, body: bytes = b"") -> bytes:
    """A PNG that claims a size, whatever it holds."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("encoding", ["JPEG", "PNG", "WEBP", "GIF"])
def test_the_shorter_side_becomes_the_asked_one(encoding: str) -> None:
    resized = resize_picture(encode(photo(), encoding), CONFIG)
    assert (resized.reason, resized.width, resized.height) == ("", 107, 64)
    assert (resized.original_width, resized.original_height) == (200, 120)
    assert decode(resized.image).shape == (64, 107, 3)


def test_a_small_picture_stays_as_it_is() -> None:
    image = photo(50, 40)
    resized = resize_picture(encode(image, "PNG"), CONFIG)
    assert (resized.width, resized.height) == (50, 40)
    np.testing.assert_array_equal(decode(resized.image), np.asarray(image))


def test_one_pixel_is_a_picture() -> None:
    resized = resize_picture(encode(Image.new("RGB", (1, 1), "red"), "PNG"), CONFIG)
    assert (resized.reason, resized.width, resized.height) == ("", 1, 1)


@pytest.mark.parametrize("encoding", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("percent", [0, 1, 5, 10, 25, 50, 75, 90, 97])
def test_a_truncated_picture_is_refused_wherever_it_ends(encoding: str, percent: int) -> None:
    data = encode(photo(), encoding)
    resized = resize_picture(data[: len(data) * percent // 100], CONFIG)
    assert resized.reason in ("broken_picture", "not_a_picture")
    assert resized.image == b""


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<!doctype html><img src=x>",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7 ",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"SIMPLE  =                    T" + b" " * 3000,
        b"BM" + bytes(200),
        b"II*\x00" + bytes(200),
        b"\x00\x00\x00\x18ftypheic" + bytes(100),
    ],
)
def test_what_is_not_one_of_our_formats_is_not_opened(data: bytes) -> None:
    assert resize_picture(data, CONFIG).reason == "not_a_picture"


@pytest.mark.parametrize("size", [(65535, 65535), (40_000, 1), (1, 1_000_000), (20_000, 4_000)])
def test_a_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    assert resize_picture(png_header(*size), CONFIG).reason == "too_many_pixels"


def test_a_claim_within_the_cap_that_the_data_does_not_fill_is_broken() -> None:
    data = png_header(3000, 3000, zlib.compress(b"\0" * 1000))
    assert resize_picture(data, CONFIG).reason == "broken_picture"


def test_transparent_pixels_become_white_in_every_mode() -> None:
    clear = Image.new("RGBA", (80, 80), (255, 0, 0, 0))
    palette = Image.new("P", (80, 80), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    for data in (
        encode(clear, "PNG"),
        encode(clear, "WEBP", lossless=True),
        encode(palette, "PNG", transparency=0),
        encode(palette, "GIF", transparency=0),
        encode(Image.new("LA", (80, 80), (0, 0)), "PNG"),
    ):
        resized = resize_picture(data, CONFIG)
        assert resized.reason == ""
        assert (decode(resized.image) == 255).all()


def test_cmyk_and_grey_and_sixteen_bits_come_out_in_the_right_colours() -> None:
    red = resize_picture(encode(Image.new("CMYK", (80, 80), (0, 255, 255, 0)), "JPEG"), CONFIG)
    assert np.abs(decode(red.image).astype(int) - [254, 0, 0]).max() <= 8
    grey = resize_picture(encode(Image.new("L", (80, 80), 100), "JPEG"), CONFIG)
    assert (decode(grey.image) == 100).all()
    deep = Image.fromarray(np.full((80, 80), 32_896, dtype=np.uint16))
    assert (decode(resize_picture(encode(deep, "PNG"), CONFIG).image) == 128).all()


def test_only_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (80, 80), colour) for colour in ("red", "blue", "green")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode(resize_picture(data, CONFIG).image) == [255, 0, 0]).all()


def test_a_picture_is_turned_as_its_camera_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    resized = resize_picture(encode(photo(200, 120), "JPEG", exif=exif), CONFIG)
    assert (resized.original_width, resized.original_height) == (120, 200)


@pytest.mark.parametrize("size", [(200, 120), (17, 33), (1, 1), (48, 16)])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_a_jpeg_has_the_pixels_that_pillow_gives_it(
    subsampling: int, progressive: bool, size: tuple[int, int]
) -> None:
    data = encode(
        photo(*size), "JPEG", subsampling=subsampling, progressive=progressive, quality=80
    )
    resized = resize_picture(data, ResizeConfig(short_side=1000, encoding="png"))
    np.testing.assert_array_equal(decode(resized.image), decode(data))


def test_nothing_of_the_sent_bytes_is_kept() -> None:
    data = encode(photo(), "JPEG", comment=b"<script>alert(1)</script>") + b"PK\x03\x04 a zip file"
    resized = resize_picture(data, ResizeConfig(short_side=64))
    assert resized.reason == ""
    assert b"script" not in resized.image
    assert b"PK\x03\x04" not in resized.image


def test_random_damage_never_raises() -> None:
    rng = np.random.default_rng(1)
    for encoding in ("JPEG", "PNG", "WEBP", "GIF"):
        data = np.frombuffer(encode(photo(60, 60), encoding), np.uint8)
        for _ in range(60):
            damaged = data.copy()
            damaged[rng.integers(0, len(data), 6)] = rng.integers(0, 256, 6)
            resized = resize_picture(damaged.tobytes(), CONFIG)
            assert bool(resized.image) != bool(resized.reason)


def test_the_same_bytes_give_the_same_picture() -> None:
    data = encode(photo(), "JPEG")
    assert resize_picture(data, ResizeConfig()) == resize_picture(data, ResizeConfig())


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"quality must be in 1\.\.100, got 0"):
        ResizeConfig(quality=0)
    with pytest.raises(ValueError, match="short_side must be at least 1, got 0"):
        ResizeConfig(short_side=0)
