"""Verify a dataset: `python -m jobs.check_shards DATASET [--gc]`; 1 if it has a fault."""

import sys
from collections.abc import Sequence

from jobs import runtime
from jobs.configs.check_shards import CheckShardsJob
from pipelines.data import checking, garbage, plan
from pipelines.data.stage import Manifest


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 whole, 1 a fault, or the store is away, 2 no dataset."""
    return runtime.run_look("check_shards", CheckShardsJob, check_shards, argv)


def check_shards(job: CheckShardsJob) -> int:
    """Print each fault as it is found, and what was checked."""
    faults = 0
    for fault in checking.check(job.dataset):
        print(f"{fault.file}: {fault.what}", flush=True)
        faults += 1
    if faults:
        print(f"{job.dataset}: {faults} fault(s)", flush=True)
    else:
        manifest = Manifest.load(job.dataset)
        print(
            f"{job.dataset}: whole: {len(manifest.shards):,} shards, "
            f"{manifest.rows_in:,} rows in = {manifest.rows_out:,} kept + "
            f"{sum(manifest.dropped.values()):,} dropped, digest {manifest.digest}"
        )
    if job.gc:
        with plan.lease(job.dataset):
            removed = garbage.collect(job.dataset)
        print(f"removed {removed.files:,} abandoned files, {removed.bytes:,} bytes")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
