"""How far datasets are: `python -m jobs.data_status DATASET… [--json]`."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from jobs import runtime
from jobs.configs.data_status import DataStatusJob
from pipelines.data.status import DatasetStatus, ShardStatus, status

MOST_REASONS = 8
UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 said, 1 the store is away, 2 no dataset or a damaged one."""
    return runtime.run_look("data_status", DataStatusJob, data_status, argv)


def data_status(job: DataStatusJob) -> int:
    """Print how far each dataset is."""
    for place in job.datasets:
        found = status(place)
        if job.json:
            print(json.dumps(asdict(found) | {"dropped": found.dropped}), flush=True)
        else:
            print("\n".join(lines(found, job.shards, time.time())), flush=True)
    return 0


def lines(found: DatasetStatus, most: int, now: float) -> Iterator[str]:
    """A table for eighty columns; `most` shards of it, 0 for all."""
    state = "finished" if found.sealed else "not finished"
    count = f"{found.committed:,} of {len(found.shards):,} shards"
    yield f"{found.place}: {found.stage}, {state}, {count}"
    yield _row("shard", "rows in", "kept", "dropped", "tries", "bytes", "age")
    shown = sorted(found.shards, key=lambda shard: (shard.committed, shard.shard))
    for shard in shown[: most or None]:
        yield _shard_row(shard, now)
    if most and len(shown) > most:
        yield f"… and {len(shown) - most:,} more: --shards 0"
    yield _total_row(found.shards)
    reasons = list(found.dropped.items())
    for reason, rows in reasons[:MOST_REASONS]:
        yield f"  {reason:40}{rows:>14,}"
    if len(reasons) > MOST_REASONS:
        yield f"  … and {len(reasons) - MOST_REASONS} reasons more: --json"


def _shard_row(shard: ShardStatus, now: float) -> str:
    if not shard.committed:
        tries = str(shard.other_attempts)
        return _row(shard.shard, "missing", "", "", tries, _size(shard.bytes), "")
    return _row(
        shard.shard,
        f"{shard.rows_in:,}",
        f"{shard.rows_out:,}",
        f"{sum(shard.dropped.values()):,}",
        str(1 + shard.other_attempts),
        _size(shard.bytes),
        _age(now - (shard.written or now)),
    )


def _total_row(shards: Sequence[ShardStatus]) -> str:
    return _row(
        "all",
        f"{sum(shard.rows_in for shard in shards):,}",
        f"{sum(shard.rows_out for shard in shards):,}",
        f"{sum(sum(shard.dropped.values()) for shard in shards):,}",
        str(sum(shard.committed + shard.other_attempts for shard in shards)),
        _size(sum(shard.bytes for shard in shards)),
        "",
    )


def _row(*cells: str) -> str:
    shard, *others = cells
    widths = (13, 13, 13, 7, 10, 8)
    return (f"{shard:14}" + "".join(map(str.rjust, others, widths))).rstrip()


def _size(count: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"


def _age(seconds: float) -> str:
    for unit, name in UNITS:
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}"
    return "now"


if __name__ == "__main__":
    sys.exit(main())
