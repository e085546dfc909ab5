"""Keep the pairs that are worth learning from: raw dataset → OUTPUT (filtered dataset)."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from jobs import runtime, shards
from jobs.configs.filter_pairs import PRESETS, FilterPairsJob
from pipelines.data import download, estimates, garbage, importing, schema
from pipelines.data.filtering import (
    FINGERPRINTS_DIRECTORY,
    FINGERPRINTS_STAGE,
    STAGE,
    commit_filtered,
    commit_fingerprints,
    judge_shard,
)
from pipelines.data.overlap import Evaluation, read_evaluation
from pipelines.data.picture_groups import DECISIONS, find_groups
from pipelines.data.stage import DatasetWriter, Manifest
from pipelines.data.storage import canonical_json
from pipelines.data.travelling import pack

OVERLAP = "overlap.json"


def main(argv: Sequence[str] | None = None) -> int:
    return runtime.run_job(STAGE, PRESETS, filter_pairs, argv, describe)


def describe(job: FilterPairsJob) -> list[str]:
    """The lines below the config of a dry run."""
    raw = _raw(job)
    pending = len(_writer(job, raw, read_evaluation(job.overlap.pictures)).pending())
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
        lambda rows: judge_shard(rows, job.filter),
    )
    said = estimates.lines(found, shards=len(raw.shards), measured="as measured here just now")
    judge = ", nor what the nsfw scorer would drop" if job.nsfw.scorer else ""
    return [*said, f"  duplicates, which only the whole shows, are not counted{judge}"]


def filter_pairs(job: FilterPairsJob) -> dict[str, Any]:
    """Filter what is missing."""
    job.nsfw.load()  # a name that is wrong is said before anything is written
    raw = _raw(job)
    evaluation = read_evaluation(job.overlap.pictures)
    writer = _writer(job, raw, evaluation)

    def work(pending: list[str]) -> Mapping[str, float]:
        prints = _fingerprints(job, raw)
        fraction = job.validation_fraction
        groups = find_groups(
            prints, job.near_duplicates, job.overlap, evaluation, validation_fraction=fraction
        )
        if evaluation.digest:
            (job.output / OVERLAP).replace(canonical_json(groups.overlap))
        commit = partial(
            commit_filtered, raw=raw, prints=prints, writer=writer, validation_fraction=fraction
        )
        nothing = DECISIONS.empty_table()
        shards.commit_each(
            writer,
            commit,
            pending,
            cpus=job.cpus_per_shard,
            row_of=lambda shard: {"decisions": pack(groups.decisions.get(shard, nothing))},
        )
        return groups.figures

    done = shards.run_stage(job, writer, work, parents={"raw": job.raw})
    garbage.collect(job.output / FINGERPRINTS_DIRECTORY)
    return done


def _raw(job: FilterPairsJob) -> Manifest:
    raw = Manifest.load(job.raw.resolve())
    if raw.stage not in (stages := (download.STAGE, importing.STAGE)):
        raise ValueError(f"{job.raw} must be made by {' or '.join(stages)}, got {raw.stage}")
    return raw


def _fingerprints(job: FilterPairsJob, raw: Manifest) -> Manifest:
    """The dataset of fingerprints, of which an earlier run may have left a part."""
    writer = DatasetWriter(
        path=job.output.resolve() / FINGERPRINTS_DIRECTORY,
        stage=FINGERPRINTS_STAGE,
        config=asdict(job.filter) | {"look": job.looks} | job.judged,
        inputs={"raw": raw.digest},
        sources={"raw": str(raw.path)},
        shards=[part.shard for part in raw.shards],
    )
    writer.claim()
    commit = partial(
        commit_fingerprints,
        raw=raw,
        writer=writer,
        config=job.filter,
        look=job.looks,
        nsfw=job.nsfw,
    )
    if pending := writer.pending():
        shards.commit_each(writer, commit, pending, cpus=job.cpus_per_shard)
    return writer.seal()


def _writer(job: FilterPairsJob, raw: Manifest, evaluation: Evaluation) -> DatasetWriter:
    settings = {
        "filter": asdict(job.filter),
        "near_duplicates": asdict(job.near_duplicates),
        # Which pictures, their digest says; not where they are.
        "overlap": {"remove": job.overlap.remove, "max_distance": job.overlap.max_distance},
        "validation_fraction": job.validation_fraction,
    } | job.judged
    found = {"evaluation": evaluation.digest} if evaluation.digest else {}
    return DatasetWriter(
        path=job.output.resolve(),
        stage=STAGE,
        config=settings,
        inputs={"raw": raw.digest} | found,
        sources={"raw": str(raw.path)},
        shards=[part.shard for part in raw.shards],
    )


if __name__ == "__main__":
    sys.exit(main())
