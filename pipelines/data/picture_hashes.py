"""Perceptual hashes: bits that stay when a picture is scaled, compressed, tinted or trimmed.

A hash says of each of the 256 lowest frequencies of a picture's brightness (16 × 16 of a discrete
cosine transform of 64 × 64, without the constant ones) whether it is above their median. Trimming
moves all of them, so a picture has ten hashes: of itself, and of itself trimmed by 4 % in each
direction, at one side, at the other or at both. Two pictures are alike if a hash of one is near
the other's own.

All sums are of whole numbers that float64 holds exactly, so their order, and with it the processor,
changes nothing.
"""

import cv2
import numpy as np

SIDE = 128
"""Pixels of the square that a picture is squeezed into before it is trimmed."""
TRIM = 5
"""Pixels of `SIDE` that the trimmed hashes go without, in each direction: 4 %."""
HASHED = 64
FREQUENCIES = 16
WORDS = FREQUENCIES**2 // 64
HASHES = 10
HASH_BITS = 64 * WORDS
FLAT = 4.0
"""Of 255, standard deviation of the brightness: below it, the bits are the compression's noise."""

_CORNERS = tuple((top, left) for top in (0, TRIM // 2, TRIM) for left in (0, TRIM // 2, TRIM))
_STEPS = np.arange(1, FREQUENCIES + 1)[:, None] * (2 * np.arange(HASHED) + 1)[None]
_BASIS = np.rint(1024 * np.cos(np.pi * _STEPS / (2 * HASHED)))


def picture_hashes(pixels: np.ndarray) -> np.ndarray | None:
    """(HASHES, WORDS) uint64, the picture's own first; None for a picture without contrast.

    `pixels` are (H, W, 3) uint8.
    """
    square = cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(square, cv2.COLOR_RGB2GRAY)
    if grey.std() < FLAT:
        return None
    inner = SIDE - TRIM
    views = [grey, *(grey[top : top + inner, left : left + inner] for top, left in _CORNERS)]
    small = [cv2.resize(view, (HASHED, HASHED), interpolation=cv2.INTER_AREA) for view in views]
    waves = _BASIS @ np.stack(small).astype(np.float64) @ _BASIS.T
    waves = waves.reshape(HASHES, HASH_BITS)
    bits = waves > np.median(waves, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(np.uint64)


def distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Bits that differ, of arrays (…, WORDS) of hashes."""
    differ: np.ndarray = np.bitwise_count(left ^ right).sum(axis=-1, dtype=np.int64)
    return differ
