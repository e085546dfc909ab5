"""From stored bytes to pixels: fast for the usual JPEG, strict for all, with a reason for the rest.

JPEG goes to libjpeg-turbo by way of simplejpeg, whose strict mode refuses what libjpeg only warns
of: a decoder that goes on paints what is missing grey, and a model would learn that. All else goes
to Pillow, under the rules of `resize.py`.
"""

import io
import warnings
from collections.abc import Iterator

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from pipelines.data.resize import DECODE_FAILURES, FORMATS, flatten, upright

MAX_PIXELS = 50_000_000  # a stored picture is our own encoding: a larger one is not ours
MAX_SCANS = 100  # libjpeg's own progressive script has ten; each costs the time of a whole picture
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF")

# JPEG's markers (ITU-T T.81, table B.1).
BASELINE, SEQUENTIAL, SCAN, APP1 = 0xC0, 0xC1, 0xDA, 0xE1
WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xDA)))


class UnusablePicture(Exception):
    """A stored picture that gives no square; `reason` is a drop reason."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def decode_picture(data: bytes) -> np.ndarray:
    """The pixels (H, W, 3) uint8 of a stored picture, upright, on white.

    Raises UnusablePicture, and nothing else, for any bytes. JPEG's own scaling (1/2, 1/4, 1/8) is
    not for crops that do not end at its blocks' edges: from 768 by way of 384 to 288, photo-like
    noise is off by 2.2 of 255 and small text by 7, on average.
    """
    if not data.startswith(b"\xff\xd8"):
        return _decode_with_pillow(data)
    segments = list(_segments(data))
    if not _has_one_scan(segments) and data.count(b"\xff\xda") > MAX_SCANS:
        raise UnusablePicture("broken_picture", f"more than {MAX_SCANS} scans")
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # broken, or a sampling that TurboJPEG has no name for
        return _decode_with_pillow(data)
    _refuse_too_many(width, height)
    if colours in ("CMYK", "YCCK"):
        _decode_strictly(data, "CMYK")  # only for its strictness: Pillow knows Adobe's inversion
        return _decode_with_pillow(data)
    pixels = _decode_strictly(data, "RGB")
    if any(marker == APP1 for marker, _ in segments):
        return _turn(pixels, data)
    return pixels


def _decode_strictly(data: bytes, colours: str) -> np.ndarray:
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, colours)
        return pixels
    except (ValueError, MemoryError) as error:
        raise UnusablePicture("broken_picture", str(error)[:100]) from error


def _decode_with_pillow(data: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            _refuse_too_many(*picture.size)
            picture.load()
            return np.asarray(flatten(upright(picture)))
        except Image.DecompressionBombError as error:
            raise UnusablePicture("too_many_pixels", "by header") from error
        except DECODE_FAILURES as error:
            alien = isinstance(error, UnidentifiedImageError) and not data.startswith(SIGNATURES)
            reason = "not_a_picture" if alien else "broken_picture"
            raise UnusablePicture(reason, type(error).__name__) from error


def _turn(pixels: np.ndarray, data: bytes) -> np.ndarray:
    """Upright as its metadata say, which Pillow reads from a picture's `info`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            picture = Image.fromarray(pixels)
            picture.info = Image.open(io.BytesIO(data), formats=("JPEG",)).info
            return np.asarray(upright(picture))
        except DECODE_FAILURES as error:
            raise UnusablePicture("broken_picture", type(error).__name__) from error


def _refuse_too_many(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnusablePicture("too_many_pixels", f"{width} x {height}")


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Marker and contents of a JPEG's segments, up to its first scan or what is no segment."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill
            at += 1
        elif marker in WITHOUT_LENGTH:
            at += 2
        else:
            end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            yield marker, data[at + 4 : end]
            if marker == SCAN:
                return
            at = max(end, at + 4)


def _has_one_scan(segments: list[tuple[int, bytes]]) -> bool:
    """A plain JPEG whose first scan holds all colours, after which libjpeg reads no other."""
    frames = [body for marker, body in segments if marker in (BASELINE, SEQUENTIAL)]
    scans = [body for marker, body in segments if marker == SCAN]
    if len(frames) != 1 or len(scans) != 1:
        return False
    (frame,), (scan,) = frames, scans
    return len(frame) > 5 and scan[:1] == frame[5:6]  # numbers of components
