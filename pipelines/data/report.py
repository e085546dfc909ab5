"""The data report: one HTML file that shows what came in, what was lost and why, and what is kept.

What it reads is bounded (`report_sampling`), so it takes as long for a billion rows as for a
million. `page.py` says what keeps hostile captions from being more than text.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipelines.data.page import write_page
from pipelines.data.report_charts import charts, hosts
from pipelines.data.report_duplicates import clusters
from pipelines.data.report_reconstructions import reconstructions
from pipelines.data.report_sampling import (
    SHARDS_FOR_REASONS,
    dropped_samples,
    kept_pictures,
    parent_of,
    sample_rows,
)
from pipelines.data.stage import Manifest, NotADataset

TEMPLATE = "report.html"
# By stage; only a retry of a download has a dataset as its input.
DATASET_INPUTS = {"encode_pairs": "filtered", "filter_pairs": "raw", "download_pairs": "raw"}
WITHOUT_PICTURES = "encode_pairs"


def write_report(path: Path, manifests: Sequence[Manifest]) -> None:
    """Write the report of datasets that are made of each other, the first one first."""
    if not manifests:
        raise ValueError("a report must have at least one dataset, got none")
    write_page(path, Path(__file__).parent / TEMPLATE, _content(manifests))


def lineage(manifest: Manifest) -> list[Manifest]:
    """The datasets that a dataset is made of, the first one first, and itself; as far as found."""
    chain = [manifest]
    while source := chain[0].sources.get(DATASET_INPUTS.get(chain[0].stage, "")):
        try:
            chain.insert(0, Manifest.load(source))
        except NotADataset:  # moved or removed since: what is left can still be shown
            break
    return chain


def _content(manifests: Sequence[Manifest]) -> dict[str, Any]:
    first, last = manifests[0], manifests[-1]
    pictured = [m for m in manifests if m.stage != WITHOUT_PICTURES]
    if not pictured:
        raise ValueError(f"{last.path} was made of pictures that are no longer where they were")
    samples = [sample_rows(manifest) for manifest in pictured]
    # A retry says of every row anew what became of it: the download before it is not counted too.
    later = [*(manifest.stage for manifest in pictured[1:]), ""]
    counted = [
        sample
        for sample, after in zip(samples, later, strict=True)
        if sample.manifest.stage != after
    ]
    decoded, why_not = (
        reconstructions(last, pictured[-1])
        if last.stage == WITHOUT_PICTURES
        else ([], "These pairs have no codes yet: jobs.encode_pairs makes them.")
    )
    return {
        "title": last.stage.replace("_", " "),
        "path": str(last.path),
        "rows_in": first.rows_in,
        "rows_out": last.rows_out,
        "stages": list(_stages(manifests)),
        "kept": kept_pictures(pictured[-1]),
        "charts": charts(samples[-1]),
        "clusters": [
            cluster
            for index, manifest in enumerate(pictured)
            for cluster in clusters(manifest, parent_of(pictured, index))
        ],
        "hosts": hosts(counted),
        "host_rows": len(samples[-1].kept) + sum(len(sample.dropped) for sample in counted),
        "reconstructions": decoded,
        "why_not": why_not,
        "opened": SHARDS_FOR_REASONS,
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
            "samples": dropped_samples(manifest, parent_of(manifests, index)),
            "path": str(manifest.path),
            "digest": manifest.digest,
            "shards": len(manifest.shards),
            "inputs": [
                {"name": name, "digest": digest, "source": manifest.sources.get(name, "")}
                for name, digest in manifest.inputs.items()
            ],
            "quarantined": manifest.config.get("quarantined", []),
            "config": json.dumps(manifest.config, indent=1),
        }


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 1)
