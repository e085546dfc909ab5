import io
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageSequence

from pipelines.data.crops import CropConfig, random_crop
from pipelines.data.decode import MAX_SCANS, UnusablePicture, decode_picture

ORIENTATION = 0x0112  # EXIF
# What a camera stores of an upright picture, by the orientation that it writes (EXIF 2.3, 4.6.4).
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise with the spectrum of photographs: as much contrast at every scale."""
    rng = np.random.default_rng(seed)
    rate = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    rate[0, 0] = 1
    waves = np.fft.fft2(rng.standard_normal((3, height, width))) / rate**1.1
    planes = np.fft.ifft2(waves).real
    planes = planes / planes.std(axis=(1, 2), keepdims=True)
    mixed = np.tensordot(0.8 + 0.2 * np.eye(3), planes, axes=1) * 25 + 128
    return mixed.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


UPRIGHT = photo(120, 160)


def encoded(picture: np.ndarray | Image.Image, kind: str, **settings: Any) -> bytes:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def cmyk(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels).convert("CMYK")


def ycck(pixels: np.ndarray) -> bytes:
    """A CMYK file whose planes hold luma and chroma, and whose Adobe marker says so."""
    luma = np.asarray(Image.fromarray(255 - pixels).convert("YCbCr"))
    planes = np.concatenate([255 - luma, np.zeros_like(luma[..., :1])], axis=2)
    data = bytearray(
        encoded(Image.frombytes("CMYK", pixels.shape[1::-1], planes.tobytes()), "JPEG")
    )
    data[data.index(b"Adobe") + 11] = 2  # transform: YCCK
    return bytes(data)


def file_with_orientation(orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = np.ascontiguousarray(STORED[orientation](UPRIGHT))
    if kind == "CMYK":
        return encoded(cmyk(stored), "JPEG", quality=95, exif=exif)
    return encoded(stored, kind, quality=95, exif=exif)


def box(size: int, cells: int) -> np.ndarray:
    """Row i of (cells, size) is the mean over the pixels from i to i + 1 cells; float64."""
    width = -(-size // cells)
    weights = np.zeros((cells, size))
    for cell in range(cells):
        weights[cell, cell * width : (cell + 1) * width] = 1
    return weights / weights.sum(axis=1, keepdims=True)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    assert one.shape == other.shape
    return float(np.abs(one.astype(np.float64) - other).mean())


def refusal(data: bytes) -> UnusablePicture:
    with pytest.raises(UnusablePicture) as caught:
        decode_picture(data)
    return caught.value


FILES = {
    "jpeg": encoded(UPRIGHT, "JPEG"),
    "progressive": encoded(UPRIGHT, "JPEG", progressive=True),
    "grey jpeg": encoded(Image.fromarray(UPRIGHT).convert("L"), "JPEG"),
    "cmyk": encoded(cmyk(UPRIGHT), "JPEG"),
    "turned": file_with_orientation(6, "JPEG"),
    "png": encoded(UPRIGHT, "PNG"),
    "palette": encoded(Image.fromarray(UPRIGHT).quantize(64), "PNG"),
    "webp": encoded(UPRIGHT, "WEBP"),
    "lossless webp": encoded(UPRIGHT, "WEBP", lossless=True),
    "gif": encoded(Image.fromarray(UPRIGHT).quantize(64), "GIF"),
}
JPEGS = ["jpeg", "progressive", "grey jpeg", "cmyk", "turned"]


@pytest.mark.parametrize("settings", [{}, {"progressive": True}, {"keep_rgb": True}], ids=str)
@pytest.mark.parametrize("sampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_the_fast_way_sees_what_pillow_sees(settings: dict[str, Any], sampling: str) -> None:
    if "keep_rgb" not in settings:
        settings = {**settings, "subsampling": sampling}
    data = encoded(UPRIGHT, "JPEG", quality=85, **settings)
    pixels = decode_picture(data)
    pillows = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert pixels.dtype == np.uint8
    assert difference(pixels, pillows) < 0.1
    assert np.abs(pixels.astype(int) - pillows).max() <= 3
    assert difference(pixels, UPRIGHT) < 8


def test_a_grey_jpeg_has_three_equal_colours() -> None:
    pixels = decode_picture(FILES["grey jpeg"])
    assert pixels.shape == UPRIGHT.shape
    assert np.ptp(pixels, axis=2).max() == 0


def test_inks_are_seen_as_the_colours_they_print() -> None:
    assert difference(decode_picture(encoded(cmyk(UPRIGHT), "JPEG", quality=95)), UPRIGHT) < 6
    assert difference(decode_picture(ycck(UPRIGHT)), UPRIGHT) < 8


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    wide = np.linspace(0, 65535, 40 * 30 * 3).reshape(30, 40, 3).astype(np.uint16)
    for stored, wanted in [(wide, wide[..., ::-1]), (wide[..., 0], wide[..., [0, 0, 0]])]:
        pixels = decode_picture(cv2.imencode(".png", stored)[1].tobytes())
        assert np.abs(pixels - wanted / 257).max() <= 1


def test_one_bit_is_black_and_white() -> None:
    bits = UPRIGHT[..., 0] > 128
    pixels = decode_picture(encoded(Image.fromarray(bits), "PNG"))
    assert np.array_equal(pixels, np.repeat(bits[..., None] * np.uint8(255), 3, axis=2))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_what_is_transparent_shows_white(mode: str, kind: str) -> None:
    if (mode, kind) == ("LA", "WEBP"):
        mode = "RGBA"  # WebP has no grey
    colours = UPRIGHT if mode == "RGBA" else UPRIGHT[..., :1]
    alpha = np.tile(np.linspace(0, 255, 160).astype(np.uint8), (120, 1))[..., None]
    image = Image.fromarray(np.concatenate([colours, alpha], axis=2))
    pixels = decode_picture(encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    share = alpha / 255
    assert np.abs(pixels - (colours * share + 255 * (1 - share))).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_colour_of_a_palette_shows_white(kind: str) -> None:
    indices = np.tile(np.arange(160, dtype=np.uint8) % 4, (120, 1))
    image = Image.frombytes("P", (160, 120), indices.tobytes())
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    pixels = decode_picture(encoded(image, kind, transparency=2))
    wanted = np.array([[10, 20, 30], [200, 0, 0], [255, 255, 255], [0, 0, 200]])
    assert np.array_equal(pixels, wanted[indices])


@pytest.mark.parametrize("kind", ["JPEG", "CMYK", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_orientation_looks_like_the_upright_picture(orientation: int, kind: str) -> None:
    pixels = decode_picture(file_with_orientation(orientation, kind))
    assert difference(pixels, UPRIGHT) < 8
    # 1/f noise differs from its own mirror images by about its standard deviation.
    assert difference(pixels, UPRIGHT[:, ::-1]) > 15


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (32, 24), colour) for colour in ("red", "green", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
    assert len(list(ImageSequence.Iterator(Image.open(io.BytesIO(data))))) == 3
    pixels = decode_picture(data)
    assert pixels.shape == (24, 32, 3)
    assert np.abs(pixels.astype(int) - [255, 0, 0]).max() <= 2


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("percent", range(5, 100, 5))
def test_a_truncated_picture_is_broken(name: str, percent: int) -> None:
    data = FILES[name]
    assert refusal(data[: len(data) * percent // 100]).reason == "broken_picture"


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_that_ends_early_is_not_painted_grey(name: str) -> None:
    """Pillow alone would take these, and OpenCV too: with an end marker they look whole."""
    data = FILES[name]
    scans = data.index(b"\xff\xda")
    for share in (0.3, 0.6, 0.9):
        cut = data[: scans + int(share * (len(data) - scans))].rstrip(b"\xff")
        assert refusal(cut + b"\xff\xd9").reason == "broken_picture"


@settings(max_examples=400, deadline=None)
@given(
    name=st.sampled_from(sorted(FILES)),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 7)), min_size=1, max_size=8),
    in_header=st.booleans(),
)
def test_flipped_bits_raise_nothing_else(
    name: str, flips: list[tuple[float, int]], in_header: bool
) -> None:
    data = bytearray(FILES[name])
    reach = min(len(data), 700) if in_header else len(data)
    for place, bit in flips:
        data[int(place * (reach - 1))] ^= 1 << bit
    check_no_other_exception(bytes(data))


@settings(max_examples=200, deadline=None)
@given(
    start=st.sampled_from([data[:cut] for data in FILES.values() for cut in (3, 12, 40, 200)]),
    rest=st.binary(max_size=300),
)
def test_any_bytes_raise_nothing_else(start: bytes, rest: bytes) -> None:
    check_no_other_exception(rest)
    check_no_other_exception(start + rest)


def check_no_other_exception(data: bytes) -> None:
    try:
        pixels = decode_picture(data)
    except UnusablePicture as error:
        told = error
    else:
        assert pixels.dtype == np.uint8
        assert pixels.shape[2:] == (3,)
        return
    assert told.reason in ("broken_picture", "not_a_picture", "too_many_pixels")
    assert "object at" not in told.detail  # details are part of a dataset's digest


def png_claiming(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(header))
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + crc + encoded(UPRIGHT, "PNG")[33:]
    )


def jpeg_claiming(side: int, name: str) -> bytes:
    data = bytearray(FILES[name])
    frame = data.index(b"\xff\xc2" if name == "progressive" else b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        png_claiming(65535, 65535),
        png_claiming(8000, 8000),
        png_claiming(2_000_000_000, 1),
        *(jpeg_claiming(side, name) for side in (65500, 8000) for name in JPEGS),
    ],
)
def test_the_header_decides_before_anything_is_decoded(data: bytes) -> None:
    started = time.process_time()
    assert refusal(data).reason == "too_many_pixels"
    assert time.process_time() - started < 0.1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_strip_is_decoded_and_gives_no_square(kind: str) -> None:
    for shape in ((1, 5000), (5000, 1)):
        strip = Image.fromarray(np.full((*shape, 3), 200, np.uint8))
        pixels = decode_picture(encoded(strip, kind))
        assert pixels.shape == (*shape, 3)
        with pytest.raises(UnusablePicture) as caught:
            random_crop(pixels, 2, CropConfig(), np.random.default_rng(0))
        assert caught.value.reason == "too_small"


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("index.html", "<html></html>" * 50)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"<html><body>404</body></html>",
        b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"BM" + bytes(60),
        zipped() + FILES["jpeg"],
    ],
)
def test_what_is_no_picture_is_called_so(data: bytes) -> None:
    assert refusal(data).reason == "not_a_picture"


@pytest.mark.parametrize("name", JPEGS)
def test_what_follows_a_jpeg_is_not_looked_at(name: str) -> None:
    clean = decode_picture(FILES[name])
    for tail in (b"\0" * 1000, b"garbage" * 99, zipped(), FILES["png"], FILES["jpeg"]):
        assert np.array_equal(decode_picture(FILES[name] + tail), clean)


@pytest.mark.parametrize("name", ["jpeg", "progressive", "cmyk", "turned"])
def test_a_jpeg_of_endless_scans_is_refused(name: str) -> None:
    data = FILES[name]
    scan = data[data.rindex(b"\xff\xda") : -2]
    if name != "progressive":  # colours apart, so that libjpeg goes on after the first scan
        scan = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + scan[-40:]
        data = data.replace(data[data.rindex(b"\xff\xda") :], scan + b"\xff\xd9")
    error = refusal(data[:-2] + scan * (MAX_SCANS + 1) + data[-2:])
    assert error.reason == "broken_picture"
    assert "scans" in error.detail
