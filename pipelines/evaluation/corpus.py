"""What a model is judged on: captions, tokens and true pictures of a token dataset."""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from pipelines.data.decode import decode_picture
from pipelines.data.split import Split, rows_of
from pipelines.data.stage import Manifest

COLUMNS = ["key", "caption", "image_tokens", "crop_size", "crop_left", "crop_top"]


@dataclass(frozen=True)
class Corpus:
    """N rows of a token dataset and the crops that they were made of."""

    keys: list[str]
    captions: list[str]
    image_tokens: np.ndarray  # (N, grid²) int64
    pictures: np.ndarray  # (N, S, S, 3) uint8

    def __len__(self) -> int:
        return len(self.keys)


def read_corpus(
    tokens: Manifest, filtered: Manifest, *, image_size: int, most: int, split: Split = "all"
) -> Corpus:
    """At most `most` rows of a split, spread evenly over it; a smaller one is read whole.

    Memory: 3 · image_size² bytes a row.
    """
    parts = rows_of(tokens, split)
    total = sum(map(len, parts))
    if total < 2:
        which = "" if split == "all" else f" of the split {split}"
        raise ValueError(f"{tokens.path} must hold at least two pictures{which}, got {total}")
    wanted = set(np.linspace(0, total - 1, min(most, total)).round().astype(int).tolist())
    rows: list[dict[str, Any]] = []
    pictures: list[np.ndarray] = []
    first = 0
    for shard, inside in zip(tokens.shards, parts, strict=True):
        table = tokens.read(shard.shard, COLUMNS).slice(inside.start, len(inside))
        chosen = [index for index in range(len(table)) if first + index in wanted]
        first += len(table)
        if not chosen:
            continue
        part = table.take(chosen).to_pylist()
        images = _images(filtered, shard.shard, {row["key"] for row in part})
        rows += part
        pictures += [true_crop(images[row["key"]], row, image_size) for row in part]
    codes = [np.frombuffer(row["image_tokens"], dtype="<u2") for row in rows]
    return Corpus(
        keys=[row["key"] for row in rows],
        captions=[row["caption"] for row in rows],
        image_tokens=np.stack(codes).astype(np.int64),
        pictures=np.stack(pictures),
    )


def true_crop(image: bytes, row: dict[str, Any], image_size: int) -> np.ndarray:
    """The square that was encoded, scaled as it was then: (image_size, image_size, 3) uint8."""
    size, left, top = row["crop_size"], row["crop_left"], row["crop_top"]
    square = decode_picture(image)[top : top + size, left : left + size]
    return cv2.resize(square, (image_size, image_size), interpolation=cv2.INTER_AREA)


def _images(filtered: Manifest, shard: str, keys: set[str]) -> dict[str, bytes]:
    """Stored pictures by key; a token shard holds the rows of the filtered shard of its name."""
    table = filtered.read(shard, ["key", "image"])
    pairs = zip(table["key"].to_pylist(), table["image"].to_pylist(), strict=True)
    images = {key: image for key, image in pairs if key in keys}
    if missing := keys - images.keys():
        raise ValueError(
            f"{filtered.path} must hold the pictures that the tokens were made of, but "
            f"{len(missing)} of shard {shard} are missing, the first {min(missing)}"
        )
    return images
