"""From fetched bytes to a stored picture: checked, decoded, flattened, scaled, encoded anew.

What the web sent is never kept: the stored bytes are our own encoding of decoded pixels. The header
decides before anything is decoded; the scaling and encoding are img2dataset's own Resizer.
"""

import io
import os
import struct
import warnings
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
PNG_COMPRESSION = 6
# What Pillow's decoders raise on bytes that are no picture or a broken one.
DECODE_FAILURES = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    MemoryError,
    struct.error,
    zlib.error,
)


@dataclass(frozen=True, kw_only=True)
class ResizeConfig:
    """What is stored of a picture."""

    short_side: int = 384
    """Pixels of the shorter side; larger pictures are scaled down, smaller ones stay.

    384 = 12/8 x 256: the dVAE's augmentation scales a square crop of side s to a side drawn from
    [min(s, 288), min(s, 384)] (paper, Listing 1), so with fewer pixels its range would shrink.
    """
    max_pixels: int = 50_000_000
    """Width x height above which a picture is refused by its header, undecoded."""
    max_side: int = 30_000
    """Longest side that is accepted; JPEG ends at 65,535."""
    encoding: Literal["jpg", "webp", "png"] = "jpg"
    quality: int = 95
    """Quality of JPEG and WebP, 1 to 100; img2dataset's default."""

    def __post_init__(self) -> None:
        for name in ("short_side", "max_pixels", "max_side"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be in 1..100, got {self.quality}")


@dataclass(frozen=True, kw_only=True)
class Resized:
    """`image` if `reason` is empty; sizes in pixels, the original ones as a person sees it."""

    image: bytes = b""
    width: int = 0
    height: int = 0
    original_width: int = 0
    original_height: int = 0
    reason: str = ""
    detail: str = ""


def resize_picture(data: bytes, config: ResizeConfig) -> Resized:
    """Make the stored picture, or say why not; never raises for bad bytes. One thread at a time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Pillow only warns between its limit and twice its limit; ours is the cap below.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        opened = _open(data, config)
        if isinstance(opened, Resized):
            return opened
        try:
            opened.load()
            picture = flatten(upright(opened))
        except DECODE_FAILURES as error:
            return Resized(reason="broken_picture", detail=_said(error))
    return _encode(picture, config)


def _open(data: bytes, config: ResizeConfig) -> Image.Image | Resized:
    """The picture by its header, not decoded yet."""
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return Resized(reason="too_many_pixels", detail="by header")
    except UnidentifiedImageError:
        return Resized(reason="not_a_picture", detail=f"none of {', '.join(FORMATS)}")
    except DECODE_FAILURES as error:
        return Resized(reason="broken_picture", detail=_said(error))
    width, height = picture.size
    if width * height > config.max_pixels or max(width, height) > config.max_side:
        return Resized(reason="too_many_pixels", detail=f"{width} x {height}")
    return picture


def _said(error: BaseException) -> str:
    """The decoder's words; details are part of the digest, so never a memory address."""
    words = str(error).splitlines()[0][:100] if str(error) else ""
    return words if words and "0x" not in words else type(error).__name__


def upright(picture: Image.Image) -> Image.Image:
    """Turned as its camera says, because the caption is about what people see."""
    try:
        return ImageOps.exif_transpose(picture)
    except DECODE_FAILURES:
        return picture  # a broken EXIF block is no reason to lose the picture


def flatten(picture: Image.Image) -> Image.Image:
    """Eight-bit RGB on a white ground, whatever the mode was."""
    if picture.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip, not scale
        grey = np.asarray(picture).astype(np.int64).clip(0, 65535) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        overlay = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", overlay.size, "white"), overlay).convert(
            "RGB"
        )
    return picture.convert("RGB")


def _encode(picture: Image.Image, config: ResizeConfig) -> Resized:
    buffer = io.BytesIO()
    picture.save(buffer, "PPM")  # raw pixels under a header: the Resizer wants a file, not an array
    image, width, height, *_, error = _resizer(config)(buffer)
    if error is not None:
        return Resized(reason="resize_failed", detail=error.splitlines()[0][:100])
    return Resized(
        image=image,
        width=width,
        height=height,
        original_width=picture.width,
        original_height=picture.height,
    )


@lru_cache(maxsize=4)
def _resizer(config: ResizeConfig) -> Any:
    # img2dataset takes 3 s to import, and its albumentations asks the internet for a newer version.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # noqa: TID251  # a worker of any cluster
    from img2dataset.resizer import Resizer

    return Resizer(
        image_size=config.short_side,
        resize_mode="keep_ratio",
        resize_only_if_bigger=True,
        downscale_interpolation="area",
        encode_format=config.encoding,
        encode_quality=PNG_COMPRESSION if config.encoding == "png" else config.quality,
    )
