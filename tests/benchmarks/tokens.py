"""Token shards: the size and the reading of our Parquet against a list column."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.schema import tokens_schema
from pipelines.data.stage import Manifest
from tests.benchmarks.measure import Effort, Row, compare_size, compare_speed
from tests.fixtures.datasets import write_dataset

GRID = 32  # the paper's 1,024 tokens a picture
VOCAB_SIZE = 8192  # the paper's
# Parquet has no 16-bit type: such a list is 32-bit numbers, or 13-bit indices into a dictionary.
LISTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("", "pyarrow list<uint16>, plain", {"compression": "none", "use_dictionary": False}),
    ("-dictionary", "pyarrow list<uint16>, its defaults", {}),
)
PACKAGES = ("pyarrow", "numpy")
ROWS_PER_SHARD = 2000  # 4 MB of tokens, of the order that jobs.encode_pairs writes


def rows(effort: Effort) -> list[Row]:
    """The same random tokens, keys and captions in both layouts; the tokens read into numpy."""
    with tempfile.TemporaryDirectory() as folder:
        ours = Path(folder) / "ours"
        tokens, table = random_shard(effort.rows)
        manifest = write_dataset(
            ours, "encode_pairs", table, inputs={}, rows_per_shard=ROWS_PER_SHARD
        )
        our_bytes = sum((ours / shard.file).stat().st_size for shard in manifest.shards)
        made = []
        for suffix, peer, settings in LISTS:
            theirs = Path(folder) / f"theirs{suffix}.parquet"
            pq.write_table(
                as_lists(table, tokens), theirs, row_group_size=ROWS_PER_SHARD, **settings
            )
            np.testing.assert_array_equal(np.concatenate(read_ours(manifest)), tokens)
            np.testing.assert_array_equal(np.concatenate(read_lists(theirs)), tokens)
            made += [
                compare_speed(
                    f"token-shard-read{suffix}",
                    peer=peer,
                    precision="uint16",
                    work=effort.rows,
                    what="rows",
                    ours=partial(read_ours, manifest),
                    theirs=partial(read_lists, theirs),
                    repeats=effort.repeats,
                    packages=PACKAGES,
                ),
                compare_size(
                    f"token-shard-bytes{suffix}",
                    peer=peer,
                    precision="uint16",
                    ours=our_bytes / effort.rows,
                    theirs=theirs.stat().st_size / effort.rows,
                    unit="bytes/row",
                    packages=PACKAGES,
                ),
            ]
        return made


def as_lists(table: pa.Table, tokens: np.ndarray) -> pa.Table:
    flat = pa.array(tokens.reshape(-1), pa.uint16())
    starts = np.arange(0, tokens.size + 1, tokens.shape[1], dtype=np.int32)
    lists = pa.ListArray.from_arrays(pa.array(starts), flat)
    index = table.schema.get_field_index("image_tokens")
    return table.set_column(index, "image_tokens", lists)


def random_shard(count: int) -> tuple[np.ndarray, pa.Table]:
    """Uniform tokens: the hardest to compress; real ones are a little smaller in both layouts."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(VOCAB_SIZE, size=(count, GRID * GRID), dtype=np.uint16)
    columns = {
        "key": [f"{index:032x}" for index in range(count)],
        "caption": [f"a picture of {index} things on a table" for index in range(count)],
        "image_tokens": [row.astype("<u2").tobytes() for row in tokens],
        "crop_size": [256] * count,
        "crop_left": [0] * count,
        "crop_top": [0] * count,
        "split": ["train"] * count,
    }
    schema = tokens_schema(GRID, stage_one="dvae", dvae_sha256="0" * 64, tokenizer_sha256="0" * 64)
    return tokens, pa.table(columns, schema=schema)


def read_ours(manifest: Manifest) -> list[np.ndarray]:
    """Tokens (n, grid²) of each shard."""
    columns = [table["image_tokens"] for table in manifest.tables(["image_tokens"])]
    buffers = [chunk.buffers()[1] for column in columns for chunk in column.chunks]
    return [np.frombuffer(buffer, "<u2").reshape(-1, GRID * GRID) for buffer in buffers]


def read_lists(path: Path) -> list[np.ndarray]:
    """Of each row group, from a list column."""
    column = pq.read_table(path, columns=["image_tokens"])["image_tokens"]
    return [chunk.flatten().to_numpy().reshape(-1, GRID * GRID) for chunk in column.chunks]
