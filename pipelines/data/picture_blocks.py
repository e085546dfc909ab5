"""A filtered shard as a stream of blocks of uint8 squares: what the decoders hand to the encoders.

A block is one row of a table: it holds the squares of one batch, whole, so that nothing on the way
can cut or join batches. Its number and what it holds are a function of the shard and the config.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data.crops import Crop, random_crop
from pipelines.data.decode import UnusablePicture, decode_picture
from pipelines.data.encoding_config import EncodingConfig
from pipelines.data.schema import DROPPED, SPLIT
from pipelines.data.shard_files import open_shard
from pipelines.data.split import check_column
from pipelines.data.stage import READ_ROWS
from pipelines.data.storage import Location

INPUT_COLUMNS = ["key", "url", "caption", "image", "split"]

KEPT = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("crop_size", pa.int32(), nullable=False),
        pa.field("crop_left", pa.int32(), nullable=False),
        pa.field("crop_top", pa.int32(), nullable=False),
        SPLIT,
    ]
)

# What is the same before and after the encoder.
PLACE = pa.schema(
    [
        pa.field("shard", pa.string()),
        pa.field("number", pa.int32()),  # of the block within the shard
        pa.field("last", pa.bool_()),  # the shard's last one
        pa.field("kept", pa.list_(pa.struct(list(KEPT)))),
        pa.field("dropped", pa.list_(pa.struct(list(DROPPED)))),  # since the block before
    ]
)
PICTURE_BLOCK = PLACE.append(pa.field("pixels", pa.large_binary()))


class ShardDecoder:
    """Cuts the squares of shard after shard: one single-threaded actor of the pipeline."""

    def __init__(self, config: EncodingConfig, image_size: int) -> None:
        self.config, self.image_size = config, image_size

    def __call__(self, shard: pa.Table) -> Iterator[pa.Table]:
        """The blocks of the shard named by this one row; the same ones at every call."""
        (row,) = shard.to_pylist()
        yield from picture_blocks(row["shard"], Location(row["file"]), self.config, self.image_size)


def picture_blocks(
    shard: str, file: Path | Location, config: EncodingConfig, image_size: int
) -> Iterator[pa.Table]:
    """The blocks of a shard, in order; every one but the last holds `batch_samples` squares."""
    yield from _blocks(shard, _read_pairs(file), config, image_size)


def cut_sample(
    rows: pa.Table, config: EncodingConfig, image_size: int
) -> tuple[pa.Table, pa.Table]:
    """What becomes of some rows, as (KEPT, DROPPED) tables; their squares are thrown away."""
    kept: list[dict[str, Any]] = []
    dropped: list[dict[str, Any]] = []
    for block in _blocks("sample", iter(rows.to_pylist()), config, image_size):
        kept += block["kept"][0].as_py()
        dropped += block["dropped"][0].as_py()
    return pa.Table.from_pylist(kept, schema=KEPT), pa.Table.from_pylist(dropped, schema=DROPPED)


def _blocks(
    shard: str, pairs: Iterator[dict[str, Any]], config: EncodingConfig, image_size: int
) -> Iterator[pa.Table]:
    block = _Block(shard, 0, config.batch_samples, image_size)
    for pair in pairs:
        try:
            crops = _crops(pair["key"], pair["image"], image_size, config)
        except UnusablePicture as error:
            row = {name: pair[name] for name in ("key", "url", "caption")}
            row |= {"reason": error.reason, "detail": error.detail}
            block.dropped += [row] * config.crops_per_picture
            continue
        for square, crop in crops:
            # Not before there is a next square: only then is this block known not to be the last.
            if block.full:
                yield block.table(last=False)
                block = _Block(shard, block.number + 1, config.batch_samples, image_size)
            block.add(square, pair, crop)
    yield block.table(last=True)


class _Block:
    """A block that is being filled."""

    def __init__(self, shard: str, number: int, size: int, side: int) -> None:
        self.shard, self.number = shard, number
        self.pixels = np.empty((size, side, side, 3), np.uint8)
        self.kept: list[dict[str, Any]] = []
        self.dropped: list[dict[str, Any]] = []

    @property
    def full(self) -> bool:
        return len(self.kept) == len(self.pixels)

    def add(self, square: np.ndarray, pair: dict[str, Any], crop: Crop) -> None:
        self.pixels[len(self.kept)] = square
        where = {"crop_size": crop.size, "crop_left": crop.left, "crop_top": crop.top}
        self.kept.append({name: pair[name] for name in ("key", "caption", "split")} | where)

    def table(self, *, last: bool) -> pa.Table:
        pixels = self.pixels[: len(self.kept)]
        offsets = np.array([0, pixels.nbytes], np.int64)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(pixels.reshape(-1))]
        columns = {
            "shard": [self.shard],
            "number": [self.number],
            "last": [last],
            "kept": [self.kept],
            "dropped": [self.dropped],
            "pixels": pa.Array.from_buffers(pa.large_binary(), 1, buffers),  # without a copy
        }
        return pa.table(columns, schema=PICTURE_BLOCK)


def _read_pairs(file: Path | Location) -> Iterator[dict[str, Any]]:
    with open_shard(Location(file)) as parquet:
        check_column(parquet.schema_arrow, str(file))
        for batch in parquet.iter_batches(READ_ROWS, columns=INPUT_COLUMNS, use_threads=False):
            yield from batch.to_pylist()


def _crops(
    key: str, image: bytes, image_size: int, config: EncodingConfig
) -> list[tuple[np.ndarray, Crop]]:
    """The crops are a function of the pair's key, wherever and whenever it is encoded."""
    picture = decode_picture(image)  # whole: a crop must not depend on how it was shrunk
    seed = int.from_bytes(hashlib.sha256(f"{config.seed}/{key}".encode()).digest()[:8], "little")
    rng = np.random.default_rng(seed)
    return [
        random_crop(picture, image_size, config.crops, rng) for _ in range(config.crops_per_picture)
    ]
