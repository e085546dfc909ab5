"""What the report reads: a stated number of rows and pictures of however large a dataset.

Rows of a shard stand in the order of a hash, so the first ones are a fair sample of it.
"""

import io
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from pipelines.data.page import inline_picture, short
from pipelines.data.shard_files import open_shard
from pipelines.data.stage import READ_ROWS, Manifest

SAMPLED_SHARDS = 8
ROWS_PER_SHARD = 4096  # of each sampled shard, kept and dropped each
KEPT_PICTURES = 48
DROPPED_PER_REASON = 9
SHARDS_FOR_REASONS = 64  # that are opened to find rows of rare reasons
THUMBNAIL = 116
QUALITY = 80
PAIR = ("caption", "url", "detail")


@dataclass(frozen=True)
class Sampled:
    """Rows of one stage without their pictures."""

    manifest: Manifest
    kept: list[dict[str, Any]]
    dropped: list[dict[str, Any]]


def sampled_shards(manifest: Manifest, most: int = SAMPLED_SHARDS) -> list[str]:
    """Shards spread evenly over the dataset."""
    names = [shard.shard for shard in manifest.shards]
    count = min(most, len(names))
    return [names[index * len(names) // count] for index in range(count)]


def sample_rows(manifest: Manifest) -> Sampled:
    """Some kept rows without pictures and codes, some dropped ones."""
    kept, dropped = [], []
    for shard in sampled_shards(manifest):
        kept += list(first_rows(manifest, shard, ROWS_PER_SHARD, without=("image", "image_tokens")))
        dropped += list(first_rows(manifest, shard, ROWS_PER_SHARD, of_dropped=True))
    return Sampled(manifest, kept, dropped)


def first_rows(
    manifest: Manifest,
    shard: str,
    count: int,
    *,
    without: Collection[str] = (),
    of_dropped: bool = False,
) -> Iterator[dict[str, Any]]:
    """The first rows of a shard, read in small batches; none if the dataset has no such shard."""
    for commit in manifest.shards:
        if commit.shard == shard:
            file = manifest.path / (commit.dropped_file if of_dropped else commit.file)
            break
    else:
        return
    with open_shard(file) as parquet:
        columns = [name for name in parquet.schema_arrow.names if name not in without]
        for batch in parquet.iter_batches(READ_ROWS, columns=columns, use_threads=False):
            yield from batch.slice(0, count).to_pylist()
            count -= batch.num_rows
            if count <= 0:
                return


def kept_pictures(manifest: Manifest) -> list[dict[str, str]]:
    """Captions and pictures of the first rows of some shards."""
    shards = sampled_shards(manifest)
    each = -(-KEPT_PICTURES // max(1, len(shards)))
    rows = (row for shard in shards for row in first_rows(manifest, shard, each))
    pictures = [
        {"caption": short(row["caption"]), "image": thumbnail(row["image"])} for row in rows
    ]
    return pictures[:KEPT_PICTURES]


def dropped_samples(manifest: Manifest, parent: Manifest | None) -> list[dict[str, Any]]:
    """Some rows of every reason, with the picture that the stage before has of them."""
    wanted: dict[str, list[dict[str, Any]]] = {reason: [] for reason in manifest.dropped}
    opened = 0
    for shard in manifest.shards:
        short_of = {reason for reason in wanted if len(wanted[reason]) < DROPPED_PER_REASON}
        if opened == SHARDS_FOR_REASONS or not short_of:
            break
        if not short_of & set(shard.dropped):
            continue
        opened += 1
        chosen = []
        for row in first_rows(manifest, shard.shard, shard.rows_in, of_dropped=True):
            if len(wanted[row["reason"]]) < DROPPED_PER_REASON:
                chosen.append(row)
                wanted[row["reason"]].append(row)
        images = pictures_of(parent, shard.shard, {row["key"] for row in chosen})
        for row in chosen:
            row["image"] = images.get(row["key"], "")
    return [
        {
            "reason": reason,
            "count": manifest.dropped[reason],
            "rows": [row | {name: short(row[name] or "") for name in PAIR} for row in rows],
        }
        for reason, rows in wanted.items()
    ]


def pictures_of(parent: Manifest | None, shard: str, keys: Collection[str]) -> dict[str, str]:
    """Thumbnails of rows by key, from the first rows of the parent's shard."""
    if parent is None or not keys:
        return {}
    found: dict[str, str] = {}
    for row in first_rows(parent, shard, ROWS_PER_SHARD):
        if row["key"] in keys:
            found[row["key"]] = thumbnail(row["image"])
            if len(found) == len(keys):
                break
    return found


def thumbnail(image: bytes) -> str:
    """A small copy; empty for a broken picture: a later stage may have dropped it for just that."""
    try:
        picture = Image.open(io.BytesIO(image)).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""
    return inline_picture(picture, (2 * THUMBNAIL, THUMBNAIL), QUALITY)


def parent_of(manifests: Sequence[Manifest], index: int) -> Manifest | None:
    """The dataset whose pictures a stage took, if the chain has it."""
    return manifests[index - 1] if index else None
