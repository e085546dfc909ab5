"""The data report: one HTML file that shows what came in, what was lost and why, and what is kept.

Captions and URLs are written by strangers: everything is escaped, nothing is loaded from anywhere,
no script runs, and pictures are encoded anew into the page.
"""

import base64
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines.data.stage import Manifest, NotADataset
from pipelines.data.storage import replace_file

TEMPLATE = "report.html"
SAMPLED_SHARDS = 8
KEPT_PICTURES = 48
DROPPED_PER_REASON = 9
DATASET_INPUTS = {"encode_pairs": "filtered", "filter_pairs": "raw"}  # by stage
WITHOUT_PICTURES = "encode_pairs"
THUMBNAIL = 116
MAX_TEXT = 300
CHART_WIDTH, CHART_HEIGHT = 480.0, 130.0
MAX_BARS = 12


def write_report(path: Path, manifests: Sequence[Manifest]) -> None:
    """Write the report of datasets that are made of each other, the first one first."""
    if not manifests:
        raise ValueError("a report must have at least one dataset, got none")
    page = _environment().get_template(TEMPLATE).render(_content(manifests))
    replace_file(path, page.encode())


def lineage(manifest: Manifest) -> list[Manifest]:
    """The datasets that a dataset is made of, the first one first, and itself; as far as found."""
    chain = [manifest]
    while source := chain[0].sources.get(DATASET_INPUTS.get(chain[0].stage, "")):
        try:
            chain.insert(0, Manifest.load(source))
        except NotADataset:  # moved or removed since: what is left can still be shown
            break
    return chain


def _environment() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)


def _content(manifests: Sequence[Manifest]) -> dict[str, Any]:
    first, last = manifests[0], manifests[-1]
    pictured = next((m for m in reversed(manifests) if m.stage != WITHOUT_PICTURES), None)
    if pictured is None:
        raise ValueError(f"{last.path} was made of pictures that are no longer where they were")
    kept = pa.concat_tables(pictured.read(shard) for shard in _sampled_shards(pictured))
    pictures = [
        {"caption": _short(row["caption"]), "image": _inline(row["image"])}
        for row in _spread(kept, KEPT_PICTURES)
    ]
    return {
        "title": last.stage.replace("_", " "),
        "path": str(last.path),
        "rows_in": first.rows_in,
        "rows_out": last.rows_out,
        "stages": list(_stages(manifests)),
        "kept": pictures,
        "charts": _charts(kept, pictured.rows_out),
    }


def _stages(manifests: Sequence[Manifest]) -> Iterator[dict[str, Any]]:
    total = manifests[0].rows_in or 1
    for index, manifest in enumerate(manifests):
        rows_in = manifest.rows_in or 1
        yield {
            "name": manifest.stage,
            "rows_in": manifest.rows_in,
            "rows_out": manifest.rows_out,
            "rows_dropped": sum(manifest.dropped.values()),
            "share_in": _percent(manifest.rows_in, total),
            "share_out": _percent(manifest.rows_out, total),
            "percent_out": _percent(manifest.rows_out, rows_in),
            "drops": [
                {
                    "reason": reason,
                    "count": count,
                    "percent": _percent(count, rows_in),
                    "share": _percent(count, total),
                }
                for reason, count in manifest.dropped.items()
            ],
            "samples": _dropped_samples(manifest, manifests[index - 1] if index else None),
            "path": str(manifest.path),
            "digest": manifest.digest,
            "shards": len(manifest.shards),
            "inputs": [
                {"name": name, "digest": digest, "source": manifest.sources.get(name, "")}
                for name, digest in manifest.inputs.items()
            ],
            "config": json.dumps(manifest.config, indent=1),
        }


def _dropped_samples(manifest: Manifest, parent: Manifest | None) -> list[dict[str, Any]]:
    """Some rows of every reason, with the picture that the stage before has of them."""
    wanted: dict[str, list[dict[str, Any]]] = {reason: [] for reason in manifest.dropped}
    for shard in manifest.shards:
        short = {reason for reason in wanted if len(wanted[reason]) < DROPPED_PER_REASON}
        if not short & set(shard.dropped):
            continue
        rows = manifest.read_dropped(shard.shard).to_pylist()
        chosen = []
        for row in rows:
            if len(wanted[row["reason"]]) < DROPPED_PER_REASON:
                wanted[row["reason"]].append(row)
                chosen.append(row)
        images = _images_of(parent, shard.shard, {row["key"] for row in chosen})
        for row in chosen:
            row["image"] = images.get(row["key"], "")
    return [
        {
            "reason": reason,
            "count": manifest.dropped[reason],
            "rows": [
                row | {name: _short(row[name] or "") for name in ("caption", "url", "detail")}
                for row in rows
            ],
        }
        for reason, rows in wanted.items()
    ]


def _images_of(parent: Manifest | None, shard: str, keys: set[str]) -> dict[str, str]:
    if parent is None or not keys:
        return {}
    table = parent.read(shard, ["key", "image"]).to_pylist()
    return {row["key"]: _inline(row["image"]) for row in table if row["key"] in keys}


def _sampled_shards(manifest: Manifest) -> list[str]:
    """Shards spread evenly over the dataset: a report reads a few, however many there are."""
    names = [shard.shard for shard in manifest.shards]
    count = min(SAMPLED_SHARDS, len(names))
    return [names[index * len(names) // count] for index in range(count)]


def _spread(table: pa.Table, count: int) -> list[dict[str, Any]]:
    count = min(count, table.num_rows)
    return [table.slice(i * table.num_rows // count, 1).to_pylist()[0] for i in range(count)]


def _charts(kept: pa.Table, rows: int) -> list[dict[str, Any]]:
    note = "" if kept.num_rows == rows else f"of {kept.num_rows:,} rows sampled"
    words = [len(caption.split()) for caption in kept["caption"].to_pylist()]
    sizes = zip(
        kept["original_width"].to_pylist(), kept["original_height"].to_pylist(), strict=True
    )
    sides = [min(size) for size in sizes]
    return [
        {"title": "Words in a caption", "note": note, "bars": _bars(words)},
        {"title": "Shorter side, pixels", "note": note, "bars": _bars(sides)},
    ]


def _bars(values: list[int]) -> list[dict[str, Any]]:
    """Whole-number bins of equal width; the last one holds all above the 99th percentile."""
    if not values:
        return []
    low, high = min(values), int(np.percentile(values, 99, method="higher"))
    step = max(1, -(-(high - low + 1) // MAX_BARS))
    edges = list(range(low, high + 1, step))
    counts = np.bincount(np.minimum((np.array(values) - low) // step, len(edges) - 1))
    width = CHART_WIDTH / max(len(edges), 4)
    bars = []
    for index, (edge, count) in enumerate(zip(edges, counts, strict=True)):
        height = round(CHART_HEIGHT * int(count) / int(counts.max()), 1)
        open_end = "+" if index == len(edges) - 1 and max(values) >= edge + step else ""
        bars.append(
            {
                "x": round(index * width + 3, 1),
                "y": round(16 + CHART_HEIGHT - height, 1),
                "width": round(width - 6, 1),
                "height": height,
                "middle": round((index + 0.5) * width, 1),
                "count": f"{count:,}",
                "label": f"{edge}{open_end}"
                if step == 1
                else f"{edge}–{edge + step - 1}{open_end}",
            }
        )
    return bars


def _inline(image: bytes) -> str:
    """A data: URI of a small copy; the stored bytes themselves never reach the page.

    Empty for a broken picture: a later stage may have dropped it for just that.
    """
    try:
        picture = Image.open(io.BytesIO(image)).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""
    picture.thumbnail((2 * THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 1)


def _short(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"
