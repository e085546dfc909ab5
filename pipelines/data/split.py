"""The validation split: which side a picture is on, and how later stages read one side only.

The side is a function of the picture's content (SHA-256 of its bytes), so it never depends on what
else a dataset holds, with one exception: pictures that are near each other go by the smallest of
their hashes, all together. So a cluster is validation if any of its pictures is, and a picture that
was held out stays held out however many rows are added.
"""

from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data.shard_files import MissingColumns
from pipelines.data.stage import Manifest

Side = Literal["train", "validation"]
Split = Literal["train", "validation", "all"]
TRAIN: Side = "train"
VALIDATION: Side = "validation"
COLUMN = "split"
PAPER_FRACTION = 606_000 / 250e6
"""The paper held out 606,000 of its 250 million pictures."""


def is_validation(contents: np.ndarray, fraction: float) -> np.ndarray:
    """Of contents' hashes, (N, …) uint8, which fall in the first `fraction` of all hashes."""
    first = np.ascontiguousarray(contents[:, :8]).view(">u8")[:, 0]
    return first.astype(np.float64) < fraction * 2.0**64


def train_first(table: pa.Table) -> pa.Table:
    """The rows of a shard with those of training in front, each side in its order."""
    train = pc.equal(table[COLUMN], TRAIN)
    return pa.concat_tables([table.filter(train), table.filter(pc.invert(train))])


def rows_of(manifest: Manifest, split: Split) -> list[range]:
    """The rows of a split in each shard of a filtered or token dataset."""
    return [
        _range(_read(manifest, part.shard, [COLUMN]), split, f"{manifest.path}, shard {part.shard}")
        for part in manifest.shards
    ]


def read_split(manifest: Manifest, shard: str, columns: list[str], split: Split) -> pa.Table:
    """Columns of one shard, and its rows of a split only, which are not copied."""
    table = _read(manifest, shard, [*columns, COLUMN])
    rows = _range(table, split, f"{manifest.path}, shard {shard}")
    return table.slice(rows.start, len(rows)).select(columns)


def check_column(schema: pa.Schema, name: str) -> None:
    """Raises ValueError for a dataset that was made before there was a split."""
    if COLUMN not in schema.names:
        raise ValueError(
            f"{name} must have a column {COLUMN!r}: it was made by an older version; "
            "make it again, beginning with filter_pairs"
        )


def _read(manifest: Manifest, shard: str, columns: list[str]) -> pa.Table:
    try:
        return manifest.read(shard, columns)
    except MissingColumns as error:
        if COLUMN in error.columns:
            check_column(pa.schema([]), f"{manifest.path}, shard {shard}")
        raise


def _range(table: pa.Table, split: Split, name: str) -> range:
    """Raises ValueError for a table without the column, or whose sides are not one after the other.

    Checked, because a row on the wrong side would be learned and judged at once, and nothing tells.
    """
    check_column(table.schema, name)
    sides = table[COLUMN].combine_chunks()
    train = pc.sum(pc.equal(sides, TRAIN)).as_py() or 0
    held_out = pc.sum(pc.equal(sides.slice(train), VALIDATION)).as_py() or 0
    if pc.index(sides, VALIDATION).as_py() not in (-1, train) or train + held_out != len(sides):
        raise ValueError(f"{name} must hold its {TRAIN} rows, then its {VALIDATION} rows")
    if split == "all":
        return range(len(sides))
    return range(train) if split == TRAIN else range(train, len(sides))
