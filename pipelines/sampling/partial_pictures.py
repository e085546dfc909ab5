"""Pictures while they are drawn: when they are shown, and what of them.

Letters: B pictures, K image tokens, H and W the picture's sides.
"""

import numpy as np
from torch import Tensor

from pipelines.sampling.codec import Codec

GREY = 128
FIRST_SHARE = 5  # the first partial picture shows a fifth


def moments(given: int, grid: int, count: int) -> list[int]:
    """Rows after which pictures are shown: first early, then in equal steps to the end.

    Whoever watches wants to see soon that something comes of it.
    """
    if count == 0 or given == grid:
        return []
    first = given + max(1, (grid - given) // FIRST_SHARE)
    steps = (first + (grid - first) * step // count for step in range(count))
    return sorted({rows for rows in steps if rows < grid})


def partial_pixels(codec: Codec, tokens: Tensor, rows: int) -> np.ndarray:
    """Pictures (B, H, W, 3) uint8 of the first rows of tokens (B, K); the rest is grey.

    The decoder looks a few rows ahead: it is shown the last row again.
    """
    grid = codec.prior_config.grid
    raster = tokens.view(-1, grid, grid).clone()
    raster[:, rows:] = raster[:, rows - 1 : rows]
    pixels = codec.decode(raster.flatten(1))
    pixels[:, rows * codec.image_size // grid :] = GREY
    return pixels
