"""Take over an img2dataset output: its tars or Parquet files → OUTPUT (raw dataset)."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from jobs import runtime, shards
from jobs.configs.import_pairs import PRESETS, ImportPairsJob
from pipelines.data.importing import STAGE, commit_imported, digest, shard_names
from pipelines.data.stage import DatasetWriter


def main(argv: Sequence[str] | None = None) -> int:
    return runtime.run_job(STAGE, PRESETS, import_pairs, argv, describe)


def describe(job: ImportPairsJob) -> list[str]:
    """The lines below the config of a dry run."""
    return [
        f"import {len(shard_names(job.images)):,} shards of {job.images}",
        f"write {job.output}",
    ]


def import_pairs(job: ImportPairsJob) -> dict[str, Any]:
    """Import what is missing."""
    folder = job.images.resolve()
    writer = DatasetWriter(
        path=job.output.resolve(),
        stage=STAGE,
        config=asdict(job.importing),
        inputs={"images": digest(folder)},
        sources={"images": str(folder)},
        shards=shard_names(folder),
    )
    commit = partial(commit_imported, folder=folder, writer=writer, config=job.importing)
    return shards.run_data_stage(job, writer, commit, cpus=job.cpus_per_shard, parents={})


if __name__ == "__main__":
    sys.exit(main())
