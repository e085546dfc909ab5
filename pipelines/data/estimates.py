"""What a data stage will give, from a sample of its input: the figures of ``--dry-run``.

The sample is the first rows of shards spread over the input. A shard's rows stand in the order of
a hash, so these are drawn at random, and the same ones every time. Ranges are 95 % intervals:
Wilson's for proportions, the normal one for means. They know nothing of rows that differ by shard.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipelines.data.report_sampling import first_rows, sampled_shards
from pipelines.data.stage import Manifest

Z = 1.96  # 95 %
SAMPLE_ROWS = 400
SIZES = {"PB": 1e15, "TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}

# Some input rows → (kept, dropped), as the stage's own function has it.
Stage = Callable[[pa.Table], tuple[pa.Table, pa.Table]]


@dataclass(frozen=True)
class Range:
    """An estimate and the ends of its interval."""

    low: float
    middle: float
    high: float

    def times(self, factor: float) -> "Range":
        return Range(self.low * factor, self.middle * factor, self.high * factor)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What is expected of all rows."""

    sample: int
    total: int
    kept: Range
    dropped: dict[str, Range]
    bytes_kept: Range
    """Of the kept rows' columns, before compression."""
    core_seconds: float


def estimate(sample: pa.Table, total: int, stage: Stage) -> Estimate:
    """Run a stage on the sample and scale it; `total` is the number of rows of the whole."""
    if not sample.num_rows:
        raise ValueError("an estimate must have at least one row to sample, got none")
    started = time.monotonic()
    kept, dropped = stage(sample)
    seconds = time.monotonic() - started
    count = kept.num_rows + dropped.num_rows
    reasons = Counter(dropped["reason"].to_pylist())
    rows = proportion(kept.num_rows, count, total).times(total)
    sizes = [batch.nbytes for i in range(kept.num_rows) for batch in kept.slice(i, 1).to_batches()]
    each = mean(sizes)
    return Estimate(
        sample=count,
        total=total,
        kept=rows,
        dropped={
            reason: proportion(number, count, total).times(total)
            for reason, number in reasons.most_common()
        },
        bytes_kept=Range(rows.low * each.low, rows.middle * each.middle, rows.high * each.high),
        core_seconds=seconds / sample.num_rows * total,
    )


def proportion(count: int, sample: int, total: int) -> Range:
    """Wilson's interval of a share; exact if the sample is the whole."""
    share = count / sample
    if sample >= total:
        return Range(share, share, share)
    middle = (share + Z * Z / (2 * sample)) / (1 + Z * Z / sample)
    spread = math.sqrt(share * (1 - share) / sample + Z * Z / (4 * sample * sample))
    half = Z * spread / (1 + Z * Z / sample)
    return Range(max(0.0, middle - half), share, min(1.0, middle + half))


def mean(values: Sequence[float]) -> Range:
    """The normal interval of a mean; nothing is known of fewer than two values."""
    if not values:
        return Range(0, 0, 0)
    middle = sum(values) / len(values)
    if len(values) == 1:
        return Range(0, middle, math.inf)
    variance = sum((value - middle) ** 2 for value in values) / (len(values) - 1)
    half = Z * math.sqrt(variance / len(values))
    return Range(max(0.0, middle - half), middle, middle + half)


def sample_of(manifest: Manifest, rows: int = SAMPLE_ROWS) -> pa.Table:
    """The first rows of shards spread over a dataset."""
    shards = sampled_shards(manifest)
    each = -(-rows // max(1, len(shards)))
    found = [row for shard in shards for row in first_rows(manifest, shard, each)]
    return pa.Table.from_pylist(found[:rows]) if found else pa.table({})


def lines(found: Estimate, *, shards: int, measured: str, more_bytes: int = 0) -> list[str]:
    """The estimate in words; `measured` says what the time was measured on.

    `more_bytes` come with every kept row and were not in the sample's tables.
    """
    held, more = found.bytes_kept, found.kept.times(more_bytes)
    held = Range(held.low + more.low, held.middle + more.middle, held.high + more.high)
    hours = found.core_seconds / 3600
    exact = "the whole" if found.sample >= found.total else f"{found.sample:,} sampled"
    return [
        f"expected of {found.total:,} rows, from {exact} (95 % intervals):",
        f"  kept: {_count(found.kept)}",
        *(f"  dropped as {reason}: {_count(rows)}" for reason, rows in found.dropped.items()),
        f"  in {shards:,} shards, {_bytes(held)} before compression",
        f"  {hours:.2g} hours of one process, {measured}",
    ]


def _count(rows: Range) -> str:
    return f"{rows.middle:,.0f} ({rows.low:,.0f} to {rows.high:,.0f})"


def _bytes(size: Range) -> str:
    return f"{_size(size.middle)} ({_size(size.low)} to {_size(size.high)})"


def _size(value: float) -> str:
    for unit, scale in SIZES.items():
        if scale <= value < math.inf:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} bytes"
