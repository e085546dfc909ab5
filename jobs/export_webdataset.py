"""Write a dataset as WebDataset tars: filtered pairs or token shards → OUTPUT/SHARD.tar."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from jobs import runtime
from jobs.configs.export_webdataset import PRESETS, ExportWebdatasetJob
from jobs.progress import Progress
from pipelines.data import plan
from pipelines.data.exporting import INDEX, STAGE, STAGES, export_shard
from pipelines.data.stage import Manifest
from pipelines.data.storage import canonical_json, create_once


def main(argv: Sequence[str] | None = None) -> int:
    return runtime.run_job(STAGE, PRESETS, export, argv, describe)


def describe(job: ExportWebdatasetJob) -> list[str]:
    """The lines below the config of a dry run."""
    manifest = _load(job)
    return [
        f"export {manifest.rows_out:,} rows of {job.dataset} ({manifest.digest[:12]})",
        f"write {len(manifest.shards):,} tars and {INDEX} to {job.output}",
    ]


def export(job: ExportWebdatasetJob) -> dict[str, Any]:
    """Write the tars that are missing, the index last."""
    manifest = _load(job)
    with plan.lease(job.output):
        plan.claim(
            job.output,
            stage=STAGE,
            config={},
            inputs={"dataset": manifest.digest},
            shards=[part.shard for part in manifest.shards],
        )
        index = job.output / INDEX
        if index.exists():
            runtime.nothing_to_do(index)
        else:
            with Progress(STAGE, len(manifest.shards), "shards") as progress:
                done = []
                for part in manifest.shards:
                    done.append(export_shard(manifest, part.shard, job.output))
                    progress.advance()
            create_once(index, canonical_json({"dataset": manifest.digest, "shards": done}))
    content = json.loads(index.read_bytes())
    return {"rows": sum(shard["rows"] for shard in content["shards"]), "output": job.output}


def _load(job: ExportWebdatasetJob) -> Manifest:
    manifest = Manifest.load(job.dataset)
    if manifest.stage not in STAGES:
        raise ValueError(
            f"{job.dataset} must be made by {' or '.join(STAGES)}, got {manifest.stage}"
        )
    return manifest


if __name__ == "__main__":
    sys.exit(main())
