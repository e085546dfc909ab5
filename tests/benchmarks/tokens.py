"""Token shards: the size and the reading of our Parquet against a list column."""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.schema import tokens_schema
from pipelines.training.token_loader import read_tokens
from tests.benchmarks.measure import Effort, Row, compare_size, compare_speed
from tests.fixtures.datasets import write_dataset

GRID = 32  # the paper's 1,024 tokens a picture
VOCAB_SIZE = 8192  # the paper's
PEER = "pyarrow list<uint16>"
PACKAGES = ("pyarrow", "numpy")
ROWS_PER_SHARD = 2000  # 4 MB of tokens, of the order that jobs.encode_pairs writes


def rows(effort: Effort) -> list[Row]:
    """The same random tokens, keys and captions in both layouts, both zstd, read into numpy."""
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "ours", Path(folder) / "theirs.parquet"
        tokens, table = random_shard(effort.rows)
        manifest = write_dataset(
            ours, "encode_pairs", table, inputs={}, rows_per_shard=ROWS_PER_SHARD
        )
        flat = pa.array(tokens.reshape(-1), pa.uint16())
        starts = np.arange(0, tokens.size + 1, tokens.shape[1], dtype=np.int32)
        lists = pa.ListArray.from_arrays(pa.array(starts), flat)
        as_lists = table.set_column(
            table.schema.get_field_index("image_tokens"), "image_tokens", lists
        )
        pq.write_table(as_lists, theirs, compression="zstd", row_group_size=ROWS_PER_SHARD)
        np.testing.assert_array_equal(read_tokens(manifest)[2], tokens)
        np.testing.assert_array_equal(read_lists(theirs)[2], tokens)
        our_bytes = sum((ours / shard.file).stat().st_size for shard in manifest.shards)
        return [
            compare_speed(
                "token-shard-read",
                peer=PEER,
                precision="uint16",
                work=effort.rows,
                what="rows",
                ours=lambda: read_tokens(manifest),
                theirs=lambda: read_lists(theirs),
                repeats=effort.repeats,
                packages=PACKAGES,
            ),
            compare_size(
                "token-shard-bytes",
                peer=PEER,
                precision="uint16",
                ours=our_bytes / effort.rows,
                theirs=theirs.stat().st_size / effort.rows,
                unit="bytes/row",
                packages=PACKAGES,
            ),
        ]


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


def read_lists(path: Path) -> tuple[list[str], list[str], np.ndarray]:
    """What read_tokens returns, from a list column."""
    table = pq.read_table(path, columns=["key", "caption", "image_tokens"])
    values = table["image_tokens"].combine_chunks().flatten().to_numpy()
    tokens = values.reshape(len(table), -1)
    return table["key"].to_pylist(), table["caption"].to_pylist(), tokens
