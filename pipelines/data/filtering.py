"""Filtering a raw dataset in two passes over its shards.

The first judges each row by itself and takes fingerprints of the pictures that stay; they are a
dataset of their own under `fingerprints/` in the output. The driver looks through the fingerprints
for pictures that are not alone (`picture_groups`), and the second pass writes what is left, with
the side of the split that each row is on.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data.decode import UnusablePicture, decode_picture
from pipelines.data.nsfw import BATCH, NsfwConfig, scores
from pipelines.data.nsfw import REASON as NSFW
from pipelines.data.picture_hashes import picture_hashes
from pipelines.data.row_rules import RowRulesConfig, judge
from pipelines.data.schema import DROPPED, FILTERED, FINGERPRINTS
from pipelines.data.split import TRAIN, VALIDATION, is_validation, train_first
from pipelines.data.stage import DatasetWriter, Manifest
from pipelines.data.travelling import unpack

STAGE = "filter_pairs"
FINGERPRINTS_STAGE = "fingerprint_pictures"
FINGERPRINTS_DIRECTORY = "fingerprints"
NO_JUDGE = NsfwConfig()
PAIR = ["key", "url", "caption"]
ROW_COLUMNS = [*PAIR, "original_width", "original_height", "sha256"]


def fingerprint_shard(
    table: pa.Table, config: RowRulesConfig, *, look: bool, nsfw: NsfwConfig = NO_JUDGE
) -> tuple[pa.Table, pa.Table]:
    """Fingerprints of the rows that pass the row rules, and the rows that do not.

    `look` decodes the pictures; without, there are no hashes, nobody is asked whether they are safe
    for work, and broken pictures stay.
    """
    reasons, details = judge(table, config)
    passed = pc.is_null(reasons)
    hashes: list[bytes | None] = [None] * table.num_rows
    if look:
        rows = np.flatnonzero(passed.to_numpy(zero_copy_only=False)).tolist()
        unusable = _look(table["image"], rows, hashes, nsfw)
        reasons, details = _also(reasons, details, unusable)
        passed = pc.is_null(reasons)
    contents = [bytes.fromhex(digest)[:16] for digest in table["sha256"].to_pylist()]
    prints = pa.table([table["key"], contents, hashes], schema=FINGERPRINTS).filter(passed)
    return prints, _dropped(table, reasons, details)


def _look(
    images: pa.ChunkedArray, rows: list[int], hashes: list[bytes | None], nsfw: NsfwConfig
) -> dict[int, UnusablePicture]:
    """Fill in the hashes of these rows; the rows that must go, and why."""
    unusable: dict[int, UnusablePicture] = {}
    scorer = nsfw.load()
    seen: dict[int, np.ndarray] = {}

    def ask() -> None:
        if scorer is not None and seen:
            for row, score in zip(seen, scores(scorer, list(seen.values())), strict=True):
                if score > nsfw.max_score:
                    unusable[row] = UnusablePicture(NSFW, f"score {score:.2f}")
        seen.clear()

    for row in rows:
        try:
            pixels = decode_picture(images[row].as_py())
        except UnusablePicture as error:
            unusable[row] = error
            continue
        ten = picture_hashes(pixels)
        hashes[row] = None if ten is None else ten.tobytes()
        if scorer is not None:
            seen[row] = pixels
        if len(seen) == BATCH:
            ask()
    ask()
    return unusable


def filter_shard(
    table: pa.Table,
    prints: pa.Table,
    dropped: pa.Table,
    decisions: pa.Table,
    *,
    validation_fraction: float,
) -> tuple[pa.Table, pa.Table]:
    """Split a shard of RAW rows in FILTERED rows and DROPPED ones.

    `prints` and `dropped` are `fingerprint_shard`'s, `decisions` is `find_groups`'.
    """
    decided = {row["key"]: row for row in decisions.to_pylist()}
    contents = dict(zip(prints["key"].to_pylist(), prints["content"].to_pylist(), strict=True))
    contents |= {key: row["representative"] for key, row in decided.items()}
    reasons = [decided.get(key, {}).get("reason") for key in table["key"].to_pylist()]
    details = [decided.get(key, {}).get("detail") for key in table["key"].to_pylist()]
    lost = _dropped(table, pa.array(reasons, pa.string()), pa.array(details, pa.string()))
    stays = pc.and_(
        pc.is_in(table["key"], prints["key"]), pc.is_null(pa.array(reasons, pa.string()))
    )
    kept = table.filter(stays)
    represented = [contents[key] for key in kept["key"].to_pylist()]
    held_out = is_validation(
        np.frombuffer(b"".join(represented), np.uint8).reshape(-1, 16), validation_fraction
    )
    sides = pa.array(np.where(held_out, VALIDATION, TRAIN), pa.string())
    kept = train_first(kept.append_column(FILTERED.field("split"), sides).cast(FILTERED))
    return kept, pa.concat_tables([dropped, lost])


def judge_shard(table: pa.Table, config: RowRulesConfig) -> tuple[pa.Table, pa.Table]:
    """What the row rules alone make of RAW rows: those that pass, and the rows that do not."""
    reasons, details = judge(table, config)
    return table.filter(pc.is_null(reasons)), _dropped(table, reasons, details)


def commit_fingerprints(
    item: Mapping[str, Any],
    *,
    raw: Manifest,
    writer: DatasetWriter,
    config: RowRulesConfig,
    look: bool,
    nsfw: NsfwConfig,
) -> dict[str, Any]:
    """Take and commit the fingerprints of the shard that `item` names."""
    table = raw.read(item["shard"], [*ROW_COLUMNS, "image"] if look else ROW_COLUMNS)
    prints, dropped = fingerprint_shard(table, config, look=look, nsfw=nsfw)
    commit = writer.commit(
        item["shard"], prints, dropped, rows_in=table.num_rows, schema=FINGERPRINTS
    )
    return {"shard": commit.shard}


def commit_filtered(
    item: Mapping[str, Any],
    *,
    raw: Manifest,
    prints: Manifest,
    writer: DatasetWriter,
    validation_fraction: float,
) -> dict[str, Any]:
    """Filter and commit one shard: `item` is its id and the packed decisions."""
    shard = item["shard"]
    table = raw.read(shard)
    kept, dropped = filter_shard(
        table,
        prints.read(shard, ["key", "content"]),
        prints.read_dropped(shard),
        unpack(item["decisions"]),
        validation_fraction=validation_fraction,
    )
    commit = writer.commit(shard, kept, dropped, rows_in=table.num_rows, schema=FILTERED)
    return {"shard": commit.shard}


def _also(
    reasons: pa.Array, details: pa.Array, broken: Mapping[int, UnusablePicture]
) -> tuple[pa.Array, pa.Array]:
    mask = np.zeros(len(reasons), bool)
    mask[list(broken)] = True
    found = [broken[row] for row in sorted(broken)]
    named = pa.array([error.reason for error in found], pa.string())
    said = pa.array([error.detail for error in found], pa.string())
    return (
        pc.replace_with_mask(reasons, pa.array(mask), named),
        pc.replace_with_mask(details, pa.array(mask), said),
    )


def _dropped(table: pa.Table, reasons: pa.Array, details: pa.Array) -> pa.Table:
    pairs = table.select(PAIR).append_column("reason", reasons).append_column("detail", details)
    return pairs.filter(pc.is_valid(reasons)).cast(DROPPED)
