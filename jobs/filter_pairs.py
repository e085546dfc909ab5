"""Keep the pairs that are worth learning from: raw dataset → OUTPUT (filtered dataset)."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from jobs import runtime, shards
from jobs.configs.filter_pairs import PRESETS, FilterPairsJob
from pipelines.data import download, estimates, importing, schema
from pipelines.data.filtering import STAGE, commit_filtered, duplicate_keys, filter_shard
from pipelines.data.stage import DatasetWriter, Manifest

if TYPE_CHECKING:
    from ray.data import Dataset


def main(argv: Sequence[str] | None = None) -> int:
    return runtime.run_job(STAGE, PRESETS, filter_pairs, argv, describe)


def describe(job: FilterPairsJob) -> list[str]:
    """The lines below the config of a dry run."""
    raw = _raw(job)
    pending = len(_writer(job, raw).pending())
    return [
        f"filter {raw.rows_out:,} pairs of {job.raw} ({raw.digest[:12]})",
        f"in {len(raw.shards):,} shards, of which {pending:,} are missing",
        f"write {job.output}",
        *_expected(job, raw),
    ]


def _expected(job: FilterPairsJob, raw: Manifest) -> list[str]:
    if not raw.rows_out:
        return []
    found = estimates.estimate(
        estimates.sample_of(raw).cast(schema.RAW),
        raw.rows_out,
        lambda rows: filter_shard(rows, job.filter, ()),
    )
    said = estimates.lines(found, shards=len(raw.shards), measured="as measured here just now")
    return [*said, "  duplicates, which only the whole shows, are not counted"]


def filter_pairs(job: FilterPairsJob) -> dict[str, Any]:
    """Filter what is missing."""
    raw = _raw(job)
    writer = _writer(job, raw)

    def graph(pending: list[str]) -> "Dataset":
        duplicates = duplicate_keys(writer.shards, raw.read, job.filter)
        rows = [{"shard": shard, "duplicates": duplicates.get(shard, [])} for shard in pending]
        work = partial(commit_filtered, raw=raw.path, writer=writer, config=job.filter)
        return shards.one_block_each(rows).map(work, num_cpus=job.cpus_per_shard)

    return shards.run_data_stage(job, writer, graph, parents={"raw": job.raw})


def _raw(job: FilterPairsJob) -> Manifest:
    raw = Manifest.load(job.raw.resolve())
    if raw.stage not in (stages := (download.STAGE, importing.STAGE)):
        raise ValueError(f"{job.raw} must be made by {' or '.join(stages)}, got {raw.stage}")
    return raw


def _writer(job: FilterPairsJob, raw: Manifest) -> DatasetWriter:
    return DatasetWriter(
        path=job.output.resolve(),
        stage=STAGE,
        config=asdict(job.filter),
        inputs={"raw": raw.digest},
        sources={"raw": str(raw.path)},
        shards=[part.shard for part in raw.shards],
    )


if __name__ == "__main__":
    sys.exit(main())
