"""Take over an img2dataset output: its tars or Parquet files → OUTPUT (raw dataset)."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from jobs import runtime, shards
from jobs.configs.import_pairs import PRESETS, ImportPairsJob
from pipelines.data import bad_files
from pipelines.data.importing import STAGE, commit_imported, digest, sound_shards
from pipelines.data.stage import DatasetWriter


def main(argv: Sequence[str] | None = None) -> int:
    return runtime.run_job(STAGE, PRESETS, import_pairs, argv, describe)


def describe(job: ImportPairsJob) -> list[str]:
    """The lines below the config of a dry run."""
    names, left_out = sound_shards(job.images, job.importing, job.on_bad_file)
    return [
        f"import {len(names):,} shards of {job.images}",
        f"write {job.output}",
        *bad_files.in_words(left_out),
    ]


def import_pairs(job: ImportPairsJob) -> dict[str, Any]:
    """Import what is missing."""
    folder = job.images.resolve()
    names, left_out = sound_shards(folder, job.importing, job.on_bad_file)
    writer = DatasetWriter(
        path=job.output.resolve(),
        stage=STAGE,
        config=asdict(job.importing) | bad_files.in_settings(left_out),
        inputs={"images": digest(folder, names)},
        sources={"images": str(folder)},
        shards=names,
    )
    commit = partial(commit_imported, folder=folder, writer=writer, config=job.importing)
    done = shards.run_data_stage(job, writer, commit, cpus=job.cpus_per_shard, parents={})
    return done | shards.say_left_out(left_out)


if __name__ == "__main__":
    sys.exit(main())
