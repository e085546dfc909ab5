"""The pictures that a stage-one model is judged on: one square of each, the same every time."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.data.crops import CropConfig, random_crop
from pipelines.data.decode import UnusablePicture, decode_picture
from pipelines.data.split import Split, rows_of
from pipelines.data.stage import Manifest

# The largest square in the middle, scaled by area to the model's size: nothing is left to chance.
CENTRE = CropConfig(scale_low=1, scale_high=1, slack_low=0.5, slack_high=0.5, flip=False)


@dataclass(frozen=True, kw_only=True)
class Square:
    """A picture of the dataset as the model sees it."""

    key: str
    caption: str
    pixels: np.ndarray  # (S, S, 3) uint8


def centre_squares(
    manifest: Manifest, image_size: int, count: int, split: Split = "all"
) -> Iterator[Square | None]:
    """`count` pictures spread evenly over a split of a dataset, None in place of an unusable one.

    One shard's stored pictures are in memory at a time, and one decoded picture.
    """
    parts = rows_of(manifest, split)
    wanted = np.linspace(0, sum(map(len, parts)) - 1, count).round().astype(int)
    first = 0
    for shard, part in zip(manifest.shards, parts, strict=True):
        inside = (wanted >= first) & (wanted < first + len(part))
        rows = wanted[inside] - first + part.start
        first += len(part)
        if not len(rows):
            continue
        table = manifest.read(shard.shard, ["key", "caption", "image"]).take(rows)
        for index in range(len(table)):
            yield _square(table.slice(index, 1).to_pylist()[0], image_size)


def _square(row: dict[str, Any], image_size: int) -> Square | None:
    unused = np.random.default_rng(0)
    try:
        pixels, _ = random_crop(decode_picture(row["image"]), image_size, CENTRE, unused)
    except UnusablePicture:
        return None
    return Square(key=row["key"], caption=row["caption"], pixels=pixels)
