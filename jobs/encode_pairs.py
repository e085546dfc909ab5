"""Encode filtered pictures to token shards: filtered dataset + dVAE → OUTPUT (token dataset)."""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jobs import runtime, shards
from jobs.configs.encode_pairs import PRESETS, EncodePairsJob
from pipelines.data.encoding import STAGE, EncodingPlan, ShardEncoder, plan_encoding

if TYPE_CHECKING:
    from ray.data import Dataset


def main(argv: Sequence[str] | None = None) -> int:
    return runtime.run_job(STAGE, PRESETS, encode, argv, describe)


def describe(job: EncodePairsJob) -> list[str]:
    """The lines below the config of a dry run."""
    encoding = _plan(job)
    crops = encoding.filtered.rows_out * job.encoding.crops_per_picture
    pending = len(encoding.writer.pending())
    return [
        f"encode {crops:,} crops of {job.filtered} ({encoding.filtered.digest[:12]})",
        f"in {len(encoding.writer.shards):,} shards, of which {pending:,} are missing",
        f"write {job.output}",
    ]


def encode(job: EncodePairsJob) -> dict[str, Any]:
    """Encode what is missing."""
    encoding = _plan(job)
    writer = encoding.writer

    def graph(pending: list[str]) -> "Dataset":
        from ray.data import ActorPoolStrategy

        encoders = min(job.encoders, len(pending))
        device = "cuda" if job.gpus_per_encoder else "cpu"
        threads = max(1, (os.cpu_count() or 1) // encoders)
        return shards.one_block_each([{"shard": shard} for shard in pending]).map(
            ShardEncoder,
            fn_constructor_args=(encoding, device, threads),
            compute=ActorPoolStrategy(size=encoders),
            num_cpus=1,
            num_gpus=job.gpus_per_encoder,
        )

    parents = {"filtered": job.filtered, "dvae": job.dvae.parent, "tokenizer": job.tokenizer.parent}
    return shards.run_data_stage(job, writer, graph, parents=parents)


def _plan(job: EncodePairsJob) -> EncodingPlan:
    return plan_encoding(job.filtered, job.tokenizer, job.dvae, job.output, job.encoding)


if __name__ == "__main__":
    sys.exit(main())
