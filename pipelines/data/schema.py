"""The columns of every dataset on disk."""

import pyarrow as pa

SCHEMA_VERSION = "2"  # 2: filtered and token rows have a split

RAW = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),  # re-encoded, never the web's own bytes
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("original_width", pa.int32(), nullable=False),
        pa.field("original_height", pa.int32(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),  # of the bytes as fetched
    ]
)

SPLIT = pa.field("split", pa.string(), nullable=False)
"""train or validation; the rows of training come first in every shard."""

FILTERED = RAW.append(SPLIT)

FINGERPRINTS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("content", pa.binary(16), nullable=False),  # the first half of RAW's sha256
        pa.field("hashes", pa.binary(320)),  # of the picture, see picture_hashes; null: no contrast
    ]
)

DROPPED = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("url", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string()),
    ]
)


def tokens_schema(
    grid: int, *, stage_one: str, dvae_sha256: str, tokenizer_sha256: str
) -> pa.Schema:
    """Columns of a token shard; `grid` is the number of tokens a side.

    `stage_one` is the kind of model that made the tokens, dvae or vqvae, `dvae_sha256` its digest.

    Image tokens are little-endian uint16 in a fixed-size binary: Parquet has no 16-bit integer, and
    reads a list<uint16>, which it stores as int32, more slowly (`make bench`: token-shard-read).
    """
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("caption", pa.string(), nullable=False),
            pa.field("image_tokens", pa.binary(2 * grid * grid), nullable=False),
            pa.field("crop_size", pa.int32(), nullable=False),
            pa.field("crop_left", pa.int32(), nullable=False),
            pa.field("crop_top", pa.int32(), nullable=False),
            SPLIT,
        ],
        metadata={
            "manray.schema_version": SCHEMA_VERSION,
            "manray.grid": str(grid),
            "manray.stage_one": stage_one,
            "manray.dvae_sha256": dvae_sha256,
            "manray.tokenizer_sha256": tokenizer_sha256,
        },
    )
