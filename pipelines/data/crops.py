"""From a stored picture to the square that a model sees: the paper's Listings 1 and 2.

Everything is a function of its arguments: randomness comes from an explicit numpy Generator.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from pipelines.data.decode import UnusablePicture


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """How a square is taken. The defaults are the dVAE's augmentation (paper, Listing 1).

    A square as large as the picture is cut, scaled to a random side and cut again.
    """

    scale_low: float = 9 / 8
    """Smallest side to scale to, in units of the model's picture size (288 for 256)."""
    scale_high: float = 12 / 8
    """Largest side to scale to (384 for 256); a picture is never scaled up."""
    slack_low: float = 0.0
    """The first cut starts at this share of the room the picture leaves at the earliest."""
    slack_high: float = 1.0
    """And at this share at the latest."""
    flip: bool = True
    """Mirror half of the squares left to right."""

    def __post_init__(self) -> None:
        if not 1 <= self.scale_low <= self.scale_high:
            raise ValueError(
                f"scales must be 1 <= scale_low <= scale_high, "
                f"got {self.scale_low}, {self.scale_high}"
            )
        if not 0 <= self.slack_low <= self.slack_high <= 1:
            raise ValueError(
                f"slacks must be 0 <= slack_low <= slack_high <= 1, "
                f"got {self.slack_low}, {self.slack_high}"
            )


# Listing 2: nearly centred, 256 to 288 for 256, and no mirror image, because pictures hold text.
ENCODE_CROPS = CropConfig(
    scale_low=1.0, scale_high=9 / 8, slack_low=3 / 8, slack_high=5 / 8, flip=False
)


@dataclass(frozen=True, kw_only=True)
class Crop:
    """Which square of the stored picture was taken, in its pixels, rounded."""

    size: int
    left: int
    top: int


def random_crop(
    picture: np.ndarray, image_size: int, config: CropConfig, rng: np.random.Generator
) -> tuple[np.ndarray, Crop]:
    """A square (image_size, image_size, 3) uint8 of a picture (H, W, 3), and where it was.

    Raises UnusablePicture if the picture's short side is below `image_size`: it would have to be
    scaled up.
    """
    height, width = picture.shape[:2]
    short = min(height, width)
    if short < image_size:
        raise UnusablePicture("too_small", f"{width} x {height}, {image_size} wanted")
    top, left = (_offset(side - short, config, rng) for side in (height, width))
    low, high = (round(scale * image_size) for scale in (config.scale_low, config.scale_high))
    side = int(rng.integers(min(short, low), min(short, high), endpoint=True))
    y, x = (int(rng.integers(0, side - image_size, endpoint=True)) for _ in range(2))
    square = picture[top : top + short, left : left + short]
    if side != short:
        square = _scale(square, side, y + image_size, x + image_size)
    pixels = square[y : y + image_size, x : x + image_size]
    if config.flip and rng.random() < 0.5:
        pixels = cv2.flip(pixels, 1)  # 4 times as fast as numpy's copy of a mirrored view
    back = short / side
    crop = Crop(
        size=round(image_size * back), left=left + round(x * back), top=top + round(y * back)
    )
    return np.ascontiguousarray(pixels), crop


def _offset(slack: int, config: CropConfig, rng: np.random.Generator) -> int:
    low, high = int(config.slack_low * slack), int(config.slack_high * slack)
    return int(rng.integers(low, high, endpoint=True))


def _scale(square: np.ndarray, side: int, height: int, width: int) -> np.ndarray:
    """A square scaled to `side` by area, at least its first `height` rows and `width` columns.

    Only from the top left: there, and nowhere else, OpenCV computes the very weights of the whole.
    """
    cv2.setNumThreads(1)  # the processes are the parallelism
    ratio = side / len(square)
    # One more than needed: the last pixel of a cut is made of what is left of its area.
    rows, columns = (math.ceil(wanted / ratio) + 1 for wanted in (height, width))
    return cv2.resize(
        square[:rows, :columns], None, fx=ratio, fy=ratio, interpolation=cv2.INTER_AREA
    )
