"""`make bench`: run the topics and write runs/bench/TOPIC.json, a list of rows each."""

import os
import sys

# One thread each, before any library counts the cores: `ours` and `theirs` are per CPU.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ[_name] = "1"

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa
import torch
import tyro

from pipelines.data.storage import replace_file
from tests.benchmarks import (
    captions,
    checkpoint,
    download,
    encode_pairs,
    encoder,
    filtering,
    pictures,
    prior,
    resblock_scaling,
    sampling,
    tokens,
    two_workers,
)
from tests.benchmarks.measure import Effort, MissingPeer, Row

TOPICS: dict[str, Callable[[Effort], list[Row]]] = {
    "captions": captions.rows,
    "encoder": encoder.rows,
    "filtering": filtering.rows,
    "pictures": pictures.rows,
    "tokens": tokens.rows,
}
# Minutes, on a real Ray or with peers that `make peers` has no part in: run when they are named.
ON_DEMAND: dict[str, Callable[[Effort], list[Row]]] = {
    "checkpoint": checkpoint.rows,
    "download": download.rows,
    "encode-pairs": encode_pairs.rows,
    "prior": prior.rows,
    "resblock-scaling": resblock_scaling.rows,
    "sampling": sampling.rows,
    "two-workers": two_workers.rows,
}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Compare parts of manray with their peers, side by side in one run."""

    topics: tuple[str, ...] = tuple(TOPICS)
    """Which to run; those that take minutes only if named: checkpoint, download, encode-pairs,
    prior, resblock-scaling, sampling, two-workers."""
    output: Path = Path("runs/bench")
    """Directory for TOPIC.json; an older one of the same topic is replaced."""
    effort: Effort = field(default_factory=Effort)

    def __post_init__(self) -> None:
        known = TOPICS | ON_DEMAND
        if unknown := sorted(set(self.topics) - set(known)):
            raise ValueError(f"topics must be among {', '.join(known)}, got {unknown[0]}")


def main(argv: Sequence[str] | None = None) -> int:
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    torch.set_num_threads(1)
    try:
        bench = tyro.cli(Bench, args=argv, prog="python -m tests.benchmarks.run")
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    rows = []
    for topic in bench.topics:
        try:
            made = (TOPICS | ON_DEMAND)[topic](bench.effort)
        except MissingPeer as error:
            print(f"bench: {topic}: {error}", file=sys.stderr)
            return 2
        content = json.dumps([asdict(row) for row in made], indent=1) + "\n"
        replace_file(bench.output / f"{topic}.json", content.encode())
        rows += made
    print("\n".join(map(line_of, rows)))
    print(f"written to {bench.output}/{{{','.join(bench.topics)}}}.json")
    return 0


def line_of(row: Row) -> str:
    ratio = f"{row.ratio_median:g} ({row.ratio_min:g}-{row.ratio_max:g})"
    rates = f"{row.ours:10g} against {row.theirs:10g} {row.unit:15}"
    note = f" ({row.note})" if row.note else ""
    return f"{row.row:24}{rates} {ratio:26} {row.peer}{note}"


if __name__ == "__main__":
    sys.exit(main())
