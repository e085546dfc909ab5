"""A shard's rows in a Parquet file, on a disk or in S3: written once and read back, read often."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.storage import Location

READ_BYTES = 1 << 20


class MissingColumns(ValueError):
    """A file has not all of the columns that were asked for."""

    def __init__(self, file: Location, columns: set[str]) -> None:
        super().__init__(file, columns)  # as it is made again in another process
        self.file, self.columns = file, columns

    def __str__(self) -> str:
        return f"{self.file} must have the columns {sorted(self.columns)}, it has not"


def write_shard(file: Location, table: pa.Table) -> str:
    """Write a file under a name of its own and read it back; its SHA-256."""
    sink = pa.BufferOutputStream()
    # A dictionary of values that hardly repeat costs more to read than it saves, and so does
    # compression of tokens and hashes: read at four times the rate, they have a tenth more bytes.
    kinds = {
        f.name: "none" if pa.types.is_fixed_size_binary(f.type) else "zstd" for f in table.schema
    }
    pq.write_table(table, sink, compression=kinds, use_dictionary=False)
    data = sink.getvalue().to_pybytes()
    digest = hashlib.sha256(data).hexdigest()
    file.put(data)
    back = file.read()
    same = hashlib.sha256(back).hexdigest() == digest
    if not same or not pq.read_table(pa.BufferReader(back)).equals(table):
        raise RuntimeError(f"{file} was read back otherwise than it was written")
    return digest


def read_shard(file: Location, columns: Sequence[str] | None = None) -> pa.Table:
    """A file, or some of its columns, in the caller's one thread.

    Raises ValueError if it is not there or no readable Parquet file, and MissingColumns.
    """
    source = _opened(file)  # a store that is away is no fault of the file
    try:
        with pq.ParquetFile(source, pre_buffer=False) as parquet:
            if missing := set(columns or ()) - set(parquet.schema_arrow.names):
                raise MissingColumns(file, missing)
            return parquet.read(None if columns is None else list(columns), use_threads=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} must be a readable Parquet file: {error}") from error


def _opened(file: Location) -> Path | pa.BufferReader:
    """What pyarrow reads a file from; a file in S3 is fetched whole. Raises FileNotFoundError."""
    return pa.BufferReader(file.read()) if file.is_s3 else file.path


@contextmanager
def open_shard(file: Location) -> Iterator[pq.ParquetFile]:
    """A file to be read in small batches: a whole shard of pictures may not fit in memory.

    Raises ValueError if it is not there or no readable Parquet file.
    """
    try:
        with pq.ParquetFile(_opened(file), buffer_size=READ_BYTES) as parquet:
            yield parquet
    except (pa.ArrowInvalid, FileNotFoundError) as error:
        raise ValueError(f"{file} must be a readable Parquet file: {error}") from error
