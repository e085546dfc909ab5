"""Encode filtered pictures to token shards: filtered dataset + dVAE → OUTPUT (token dataset)."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jobs import runtime, shards
from jobs.configs.encode_pairs import PRESETS, EncodePairsJob
from jobs.encoding_actors import encode_shards
from jobs.ray_session import FOR_EVERY_JOB
from pipelines.data import estimates
from pipelines.data.encoding import STAGE, TOKEN_BYTES, EncodingPlan, plan_encoding
from pipelines.data.picture_blocks import cut_sample
from pipelines.data.storage import Location


def main(argv: Sequence[str] | None = None) -> int:
    return runtime.run_job(STAGE, PRESETS, encode, argv, describe)


def describe(job: EncodePairsJob) -> list[str]:
    """The lines below the config of a dry run."""
    plan = _plan(job)
    pictures, crops = plan.filtered.rows_out, job.encoding.crops_per_picture
    pending = plan.writer.pending()
    where = {
        "cpu": "on CPUs",
        "gpu": f"on {job.gpus_per_encoder:g} GPU each",
        "cpu_or_gpu": f"on {job.gpus_per_encoder:g} GPU each, on CPUs if there are too few GPUs",
    }
    return [
        f"encode {pictures:,} pictures of {job.filtered} ({plan.filtered.digest[:12]}), "
        f"{crops} crop(s) of each: {pictures * crops:,} rows",
        f"in {len(plan.writer.shards):,} shards, of which {len(pending):,} are missing",
        f"with {job.decoders} decoder(s) and {job.encoders} encoder(s) {where[job.device]}",
        f"write {job.output}: {plan.token_bytes(pending):,} bytes of codes, and captions",
        *_expected(plan),
    ]


def _expected(plan: EncodingPlan) -> list[str]:
    if not plan.filtered.rows_out:
        return []
    # One crop each: a picture that is unusable loses all of its crops.
    one, side = replace(plan.config, crops_per_picture=1), plan.model.image_size
    rows = sum(plan.rows_in.values())
    sample = estimates.sample_of(plan.filtered)
    found = estimates.estimate(sample, rows, lambda some: cut_sample(some, one, side))
    return estimates.lines(
        found,
        shards=len(plan.writer.shards),
        measured="a decoder's, measured here just now; encoders are not: they are the cluster's",
        more_bytes=plan.model.grid**2 * TOKEN_BYTES,
    )


def encode(job: EncodePairsJob) -> dict[str, Any]:
    """Encode what is missing."""
    plan = _plan(job)
    parents: dict[str, Path | Location] = {
        "filtered": job.filtered,
        "dvae": job.dvae.parent,
        "tokenizer": job.tokenizer.parent,
    }
    work = partial(encode_shards, job, plan)
    return shards.run_stage(job, plan.writer, work, parents=parents, least_cpus=FOR_EVERY_JOB)


def _plan(job: EncodePairsJob) -> EncodingPlan:
    return plan_encoding(job.filtered, job.tokenizer, job.dvae, job.output, job.encoding)


if __name__ == "__main__":
    sys.exit(main())
