"""What happened in every resblock of a training: scales, overflows, norms of gradients.

Kept as a JSON line a record in `resblocks.jsonl`, 2 kB for 128 resblocks.

Letters: K resblocks.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.data.storage import replace_file

BLOCKS_FILE = "resblocks.jsonl"


class BlockRecord(NamedTuple):
    """The resblocks after an update, arrays (K,) of float32."""

    step: int
    scales: np.ndarray
    """log2 of the gradient scales."""
    overflows: np.ndarray
    """Updates since the last record in which a gradient of the block was not finite."""
    norms: np.ndarray
    """Of the block's unscaled gradient in the last update; not finite if it was not."""


class BlockHistory:
    """All records of a run, in memory and in its directory."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / BLOCKS_FILE
        self.records: list[BlockRecord] = []

    def rewind(self, step: int) -> None:
        """Take over what an earlier process wrote up to a step, and forget what is after it."""
        if not self._file.exists():
            return
        # A process that was killed may have left half a line.
        lines = [line for line in self._file.read_text().splitlines() if line.endswith("}")]
        self.records = [record for line in lines if (record := _read(line)).step <= step]
        replace_file(self._file, "".join(map(_line, self.records)).encode())

    def add(self, record: BlockRecord) -> None:
        self.records.append(record)
        with self._file.open("a") as file:
            file.write(_line(record))


def _line(record: BlockRecord) -> str:
    row = {
        "step": record.step,
        "log2_scales": [round(float(value), 2) for value in record.scales],
        "overflows": [int(value) for value in record.overflows],
        # JSON has no infinity and no NaN.
        "norms": [float(f"{v:.3g}") if np.isfinite(v) else None for v in record.norms],
    }
    return json.dumps(row, separators=(",", ":"), allow_nan=False) + "\n"


def _read(line: str) -> BlockRecord:
    row = json.loads(line)
    norms = [np.inf if value is None else value for value in row["norms"]]
    return BlockRecord(
        row["step"],
        np.array(row["log2_scales"], np.float32),
        np.array(row["overflows"], np.float32),
        np.array(norms, np.float32),
    )
