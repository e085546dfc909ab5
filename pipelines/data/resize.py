"""From fetched bytes to a stored picture: checked, decoded, flattened, scaled, encoded anew.

What the web sent is never kept: the stored bytes are our own encoding of decoded pixels. The header
decides before anything is decoded. Scaling and encoding give img2dataset's bytes (a test compares),
without the 3 s that its import takes in every worker.
"""

import contextlib
import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
PNG_COMPRESSION = 6
MAX_SCANS = 100  # libjpeg's own progressive script has ten; each costs the time of a whole picture
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

    def columns(self, sha256: str) -> dict[str, Any]:
        """A raw row's columns of a picture whose bytes had this digest, or reason and detail."""
        if self.reason:
            return {"reason": self.reason, "detail": self.detail}
        return {
            "image": self.image,
            "width": self.width,
            "height": self.height,
            "original_width": self.original_width,
            "original_height": self.original_height,
            "sha256": sha256,
        }


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
            pixels = _pixels(opened, data)
        except DECODE_FAILURES as error:
            return Resized(reason="broken_picture", detail=_said(error))
    return _encode(pixels, config)


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
    if picture.format == "JPEG" and data.count(b"\xff\xda") > MAX_SCANS:
        return Resized(reason="broken_picture", detail=f"more than {MAX_SCANS} scans")
    return picture


def _pixels(picture: Image.Image, data: bytes) -> np.ndarray:
    """Decoded, upright, on white: (H, W, 3) uint8 in OpenCV's order, blue first.

    A plain JPEG goes straight to libjpeg-turbo, which is Pillow's decoder too, without Pillow's
    copies. What it so much as warns of is Pillow's to judge, so that reasons stay the same.
    """
    if picture.format == "JPEG" and picture.mode == "RGB" and not _is_turned(picture):
        with contextlib.suppress(ValueError, MemoryError):
            plain: np.ndarray = simplejpeg.decode_jpeg(data, "BGR")
            return plain
    picture.load()
    return cv2.cvtColor(np.asarray(flatten(upright(picture))), cv2.COLOR_RGB2BGR)


def _is_turned(picture: Image.Image) -> bool:
    try:
        return picture.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except DECODE_FAILURES:
        return False  # nobody can say how


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


def _encode(pixels: np.ndarray, config: ResizeConfig) -> Resized:
    cv2.setNumThreads(1)  # the processes are the parallelism
    original_height, original_width = pixels.shape[:2]
    shorter = min(original_height, original_width)
    if shorter > config.short_side:
        scale = config.short_side / shorter
        size = (max(1, round(original_width * scale)), max(1, round(original_height * scale)))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    height, width = pixels.shape[:2]
    try:
        encoded = cv2.imencode(f".{config.encoding}", pixels, encode_options(config))[1]
    except cv2.error as error:  # a side that the format cannot have
        return Resized(reason="resize_failed", detail=error.err[:100])
    return Resized(
        image=encoded.tobytes(),
        width=width,
        height=height,
        original_width=original_width,
        original_height=original_height,
    )


def encode_options(config: ResizeConfig) -> list[int]:
    """OpenCV's name and value of the quality."""
    match config.encoding:
        case "jpg":
            return [int(cv2.IMWRITE_JPEG_QUALITY), config.quality]
        case "webp":
            return [int(cv2.IMWRITE_WEBP_QUALITY), config.quality]
        case "png":
            return [int(cv2.IMWRITE_PNG_COMPRESSION), PNG_COMPRESSION]
