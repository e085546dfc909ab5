"""The report's clusters of equal and nearly equal pictures."""

from collections.abc import Sequence
from typing import Any

from pipelines.data.page import short
from pipelines.data.report_sampling import (
    PAIR,
    first_rows,
    pictures_of,
    sampled_shards,
)
from pipelines.data.stage import Manifest

EXACT, NEAR = "duplicate_picture", "near_duplicate"
KINDS = {EXACT: "the same bytes", NEAR: "nearly the same picture"}
MAX_SHARDS = 64
MAX_CLUSTERS = 6
MAX_SHOWN = 6
MAX_ROWS = 100_000  # that are held to find the largest clusters


def clusters(manifest: Manifest, parent: Manifest | None) -> list[dict[str, Any]]:
    """The largest clusters: dropped rows whose detail names the same picture, or the same row.

    The detail is the key of the row that was kept in its place.
    """
    members: dict[tuple[str, str], list[dict[str, Any]]] = {}
    held = 0
    for shard in sampled_shards(manifest, MAX_SHARDS):
        for row in first_rows(manifest, shard, MAX_ROWS - held, of_dropped=True):
            if row["reason"] in KINDS:
                members.setdefault((row["reason"], row["detail"]), []).append(row | {"of": shard})
                held += 1
    largest = sorted(members.items(), key=lambda item: (-len(item[1]), item[0]))[:MAX_CLUSTERS]
    return [
        {
            "kind": KINDS[reason],
            "detail": short(detail),
            "count": len(rows),
            "rows": _shown(detail, rows[:MAX_SHOWN], parent),
        }
        for (reason, detail), rows in largest
    ]


def _shown(
    detail: str, rows: Sequence[dict[str, Any]], parent: Manifest | None
) -> list[dict[str, Any]]:
    """The members' pictures, after that of the row that was kept if it is in their shards."""
    shards = sorted({row["of"] for row in rows})
    keys = {row["key"] for row in rows} | {detail}
    images: dict[str, str] = {}
    for shard in shards:
        images |= pictures_of(parent, shard, keys - set(images))
    texts = [row | {name: short(row[name] or "") for name in PAIR} for row in rows]
    shown = [row | {"image": images.get(row["key"], ""), "note": "dropped"} for row in texts]
    if detail in images:
        kept = {"caption": "", "url": "", "image": images[detail], "note": "kept in their place"}
        shown.insert(0, kept)
    return shown
