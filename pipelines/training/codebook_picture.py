"""The use of a codebook as a picture: which codes are used, and how unequally.

Letters: K codes.
"""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PANEL = 256  # pixels a side
GAP = 12
TEXT_SIZE = 13
PAPER = (255, 255, 255)
INK = (20, 20, 20)
GRID = (225, 225, 225)
UNUSED = (214, 69, 65)
RARE = np.array((222, 235, 247))
FREQUENT = np.array((8, 48, 107))


def codebook_picture(counts: np.ndarray, title: str) -> np.ndarray:
    """(H, W, 3) uint8 of the uses of each code, (K,).

    Left: a cell a code, from rare (light) to frequent (dark) on a logarithmic scale, red if unused.
    Right: uses by rank, both logarithmic; the line is where all would be if all were used alike.
    """
    if counts.ndim != 1 or not len(counts):
        raise ValueError(f"counts must be (K,) with at least one code, got {counts.shape}")
    font = ImageFont.load_default(TEXT_SIZE)
    top = TEXT_SIZE + 2 * GAP
    canvas = Image.new("RGB", (2 * PANEL + 3 * GAP, top + PANEL + 2 * GAP + TEXT_SIZE), PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((GAP, GAP // 2 + 2), title, INK, font)
    canvas.paste(_cells(counts), (GAP, top))
    _ranks(pen, counts, left=PANEL + 2 * GAP, top=top)
    bottom = top + PANEL + GAP // 2
    used = int((counts > 0).sum())
    pen.text((GAP, bottom), f"{used} of {len(counts)} codes used, red: unused", INK, font)
    pen.text((PANEL + 2 * GAP, bottom), "uses by rank, log-log", INK, font)
    return np.asarray(canvas)


def _cells(counts: np.ndarray) -> Image.Image:
    columns = math.ceil(math.sqrt(len(counts)))
    rows = math.ceil(len(counts) / columns)
    colours = np.full((rows * columns, 3), 255, np.uint8)
    share = np.log1p(counts) / max(float(np.log1p(counts).max()), 1e-9)
    colours[: len(counts)] = (RARE + share[:, None] * (FREQUENT - RARE)).round()
    colours[: len(counts)][counts == 0] = UNUSED
    cells = Image.fromarray(colours.reshape(rows, columns, 3))
    return cells.resize((PANEL, PANEL), Image.Resampling.NEAREST)


def _ranks(pen: ImageDraw.ImageDraw, counts: np.ndarray, *, left: int, top: int) -> None:
    pen.rectangle((left, top, left + PANEL, top + PANEL), outline=GRID)
    ranked = np.sort(counts[counts > 0])[::-1].astype(np.float64)
    if not len(ranked):
        return
    across, up = max(math.log(len(counts)), 1e-9), max(math.log(ranked[0]), 1e-9)

    def place(rank: float, uses: float) -> tuple[float, float]:
        x = left + PANEL * math.log(rank) / across
        return x, top + PANEL * (1 - math.log(max(uses, 1.0)) / up)

    equal = ranked.sum() / len(counts)
    pen.line([place(1, equal), place(len(counts), equal)], GRID, 2)
    points = [place(rank + 1, uses) for rank, uses in enumerate(ranked)]
    pen.line(points if len(points) > 1 else points * 2, tuple(FREQUENT.tolist()), 2)
