"""Input files that are not what they should be: cut off, damaged, or of other columns.

Only what a file holds makes it bad. A store or a disk that does not answer is another error, of
which nothing may be concluded about a file.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.storage import Location

OnBadFile = Literal["fail", "quarantine"]
QUARANTINED = "quarantined"  # where a dataset's settings name the files that were left out
MAGIC = b"PAR1"
ENDS = 4 + len(MAGIC)  # the footer's length and the magic number, at the end of each Parquet file


class BadFile(ValueError):
    """A file whose content is unusable; `fault` says why in our own words, the same every time."""

    def __init__(self, file: Path | Location, fault: str, said: object = "") -> None:
        super().__init__(f"{file} {fault}{f': {said}' if said else ''}")
        self.file, self.fault, self.said = Location(file), fault, str(said)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.file, self.fault, self.said)  # workers raise it too


def in_settings(left_out: Sequence[BadFile]) -> dict[str, Any]:
    """What the settings of a dataset that was made without these files say."""
    files = [{"file": bad.file.name, "fault": bad.fault} for bad in left_out]
    return {QUARANTINED: files} if files else {}


def in_words(left_out: Sequence[BadFile]) -> list[str]:
    """What must be known of files that are in no count."""
    return [f"left out, its pairs are in no count: {error}" for error in left_out]


def read_parquet_list(path: Path, file: Location, columns: Sequence[str]) -> pa.Table:
    """These columns of a Parquet file, or all if it has not all of them.

    `path` is where it can be read, `file` what it is called. Raises BadFile with the offset at
    which it stops being Parquet, or the rows that cannot be read.
    """
    _check_ends(path, file)
    try:
        parquet = pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowInvalid, OSError) as error:
        footer = path.stat().st_size - ENDS - _footer_bytes(path)
        raise _bad(file, f"has a footer (from byte {footer:,} on) that is none", error) from error
    with parquet:
        names = parquet.schema_arrow.names
        wanted = list(columns) if set(columns) <= set(names) else None
        groups = [_read_group(parquet, n, wanted, file) for n in range(parquet.num_row_groups)]
        return pa.concat_tables(
            [parquet.schema_arrow.empty_table().select(wanted or names), *groups]
        )


def _check_ends(path: Path, file: Location) -> None:
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(len(MAGIC))
    if start != MAGIC:
        raise BadFile(file, f"must be a readable .parquet URL list, but byte 0 is not {MAGIC!r}")
    with path.open("rb") as stream:
        stream.seek(max(0, size - len(MAGIC)))
        end = stream.read()
    if size < ENDS + len(MAGIC) or end != MAGIC:
        raise BadFile(
            file,
            f"must be a readable .parquet URL list, but it ends at byte {size:,} without "
            f"{MAGIC!r}: it is cut off, or still being written",
        )
    if (footer := _footer_bytes(path)) > size - ENDS - len(MAGIC):
        raise BadFile(
            file,
            f"must be a readable .parquet URL list, but at byte {size - ENDS:,} a footer of "
            f"{footer:,} bytes is claimed",
        )


def _footer_bytes(path: Path) -> int:
    with path.open("rb") as stream:
        stream.seek(-ENDS, os.SEEK_END)
        return int.from_bytes(stream.read(4), "little")


def _read_group(
    parquet: pq.ParquetFile, number: int, columns: list[str] | None, file: Location
) -> pa.Table:
    try:
        return parquet.read_row_group(number, columns=columns)
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        group = parquet.metadata.row_group(number)
        chunks = [group.column(index) for index in range(group.num_columns)]
        start = min(chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks)
        end = start + sum(chunk.total_compressed_size for chunk in chunks)
        fault = f"has a row group {number} (bytes {start:,} to {end:,}) that cannot be read"
        raise _bad(file, fault, error) from error


def _bad(file: Location, fault: str, error: Exception) -> Exception:
    """The error itself if the system, not Arrow, raised it: only the system's has a number."""
    if isinstance(error, OSError) and error.errno:
        return error
    return BadFile(file, f"must be a readable .parquet URL list, but it {fault}", error)
