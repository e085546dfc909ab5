"""Stored pictures to the squares that a model sees, against what loaders usually do with Pillow."""

import io

import numpy as np
from PIL import Image

from pipelines.data.crops import CropConfig, random_crop
from pipelines.data.decode import decode_picture
from tests.benchmarks.measure import Effort, Row, compare_speed

SIZES = {"jpeg-crop": (384, 512), "jpeg-crop-1024": (768, 1024)}
IMAGE_SIZE = 256  # the paper's
QUALITY = 85
PICTURES = 16
ROWS_PER_PICTURE = 200  # of Effort.rows: a picture takes some hundred times as long as a row
CENTRE = CropConfig(scale_low=1, scale_high=1, slack_low=0.5, slack_high=0.5, flip=False)
OUR_ERROR = 2.0  # of 255, mean absolute, against the exact mean over each pixel's area
THEIR_ERROR = 10.0  # their square lies up to a pixel beside the middle: the sides are rounded


def rows(effort: Effort) -> list[Row]:
    """The largest square in the middle, scaled to 256, of photo-like JPEGs of two sizes."""
    return [compare(row, *sides, effort) for row, sides in SIZES.items()]


def compare(row: str, height: int, width: int, effort: Effort) -> Row:
    rng = np.random.default_rng(0)
    files = [jpeg(photo(height, width, rng)) for _ in range(PICTURES)]
    for data in files:
        exact = exact_square(data)
        assert np.abs(our_square(data) - exact).mean() <= OUR_ERROR
        assert np.abs(their_square(data) - exact).mean() <= THEIR_ERROR
    count = max(PICTURES, effort.rows // ROWS_PER_PICTURE)
    work = [files[index % PICTURES] for index in range(count)]
    return compare_speed(
        row,
        peer="Pillow, bicubic",
        precision="uint8",
        work=count,
        what="pictures",
        ours=lambda: [our_square(data) for data in work],
        theirs=lambda: [their_square(data) for data in work],
        repeats=effort.repeats,
        packages=("simplejpeg", "opencv-python-headless", "pillow", "numpy"),
    )


def our_square(data: bytes) -> np.ndarray:
    return random_crop(decode_picture(data), IMAGE_SIZE, CENTRE, np.random.default_rng(0))[0]


def their_square(data: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    scale = IMAGE_SIZE / min(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - IMAGE_SIZE) // 2, (height - IMAGE_SIZE) // 2
    return np.asarray(picture.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE)))


def exact_square(data: bytes) -> np.ndarray:
    """The same from Pillow's decoding, averaged by area in float64."""
    picture = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float64)
    height, width = picture.shape[:2]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    square = picture[top : top + short, left : left + short]
    means = area_means(short, IMAGE_SIZE)
    return np.einsum("yh,hwc,xw->yxc", means, square, means, optimize=True)


def area_means(size: int, cells: int) -> np.ndarray:
    """Row i of (cells, size) weighs pixels by how much of them lies in the i-th of equal cells."""
    edges = np.linspace(0, size, cells + 1)
    pixels = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return overlap.clip(min=0) * cells / size


def photo(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Noise with the spectrum of photographs: about as much contrast at every scale."""
    rate = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    rate[0, 0] = 1
    planes = np.fft.ifft2(np.fft.fft2(rng.standard_normal((3, height, width))) / rate**1.1).real
    planes /= planes.std(axis=(1, 2), keepdims=True)
    alike = 0.8 + 0.2 * np.eye(3)  # colours mostly rise and fall together
    mixed = np.tensordot(alike, planes, axes=1) * 25 + 128
    return mixed.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
