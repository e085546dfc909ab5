"""Gradient scales and norms of a training as a picture: a row a resblock, a column a moment.

Letters: K resblocks, R records.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipelines.training.block_history import BlockRecord

WIDTH = 512  # pixels of a panel
HEIGHT = 256
GAP = 12
TEXT_SIZE = 13
PAPER = (255, 255, 255)
INK = (20, 20, 20)
OVERFLOW = (214, 69, 65)
MISSING = (229, 224, 213)
# From small to large: light to dark.
LOW = np.array((222, 235, 247))
HIGH = np.array((8, 48, 107))


def scale_picture(records: Sequence[BlockRecord], title: str) -> np.ndarray:
    """(H, W, 3) uint8 of a training's records.

    Above: log2 of the scales, the first resblock at the top, and red where a block overflowed since
    the record before. Below: log2 of the norms of gradients, grey where they were 0 or not finite.
    """
    if not records:
        raise ValueError("records must hold at least one, got none")
    records = _thinned(records)
    scales = np.stack([record.scales for record in records], axis=1)  # (K, R)
    overflows = np.stack([record.overflows for record in records], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        norms = np.log2(np.stack([record.norms for record in records], axis=1))
    font = ImageFont.load_default(TEXT_SIZE)
    line = TEXT_SIZE + GAP
    size = (WIDTH + 2 * GAP, 2 * (HEIGHT + line) + 2 * line + GAP)
    canvas = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((GAP, GAP // 2 + 2), title, INK, font)
    top = line
    for values, marked, name in (
        (scales, overflows > 0, "log2 of the scale"),
        (norms, np.zeros_like(norms, bool), "log2 of the gradient's norm"),
    ):
        pen.text((GAP, top + GAP // 2), f"{name}, {_range(values)}", INK, font)
        canvas.paste(_panel(values, marked), (GAP, top + line))
        top += line + HEIGHT
    count, last = int(overflows.sum()), records[-1].step
    words = f"{len(scales)} resblocks down, updates to {last} across; red: overflow, {count} in all"
    pen.text((GAP, top + GAP // 2), words, INK, font)
    return np.asarray(canvas)


def _thinned(records: Sequence[BlockRecord]) -> list[BlockRecord]:
    """As many as the picture has columns at most; overflows of what is left out are added up."""
    groups = np.array_split(np.arange(len(records)), min(len(records), WIDTH))
    return [
        records[group[-1]]._replace(overflows=np.sum([records[i].overflows for i in group], axis=0))
        for group in groups
    ]


def _range(values: np.ndarray) -> str:
    seen = values[np.isfinite(values)]
    return f"{seen.min():.1f} (light) to {seen.max():.1f} (dark)" if seen.size else "none finite"


def _panel(values: np.ndarray, marked: np.ndarray) -> Image.Image:  # (K, R) each
    seen = np.isfinite(values)
    low, high = (values[seen].min(), values[seen].max()) if seen.any() else (0.0, 0.0)
    share = np.where(seen, values - low, 0.0) / max(high - low, 1e-9)
    colours = (LOW + share[..., None] * (HIGH - LOW)).round().astype(np.uint8)
    colours[~seen] = MISSING
    colours[marked] = OVERFLOW
    return Image.fromarray(colours).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)
