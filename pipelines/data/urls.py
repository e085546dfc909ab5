"""URL lists: the door through which pairs come in.

A list is a Parquet, CSV, TSV or JSON-lines file with the columns `url` and `caption`. Its pairs are
sorted by key and cut in shards, so that a shard is a function of the list's content: not of the
list's order, its format or the time.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

COLUMNS = ("url", "caption")
KEY_HEX_DIGITS = 32
FORMATS = (".parquet", ".csv", ".tsv", ".jsonl")


@dataclass(frozen=True, kw_only=True)
class UrlList:
    """Pairs sorted by key; `table` has key, url, caption and `repeats`: the same pair as above."""

    table: pa.Table
    rows_per_shard: int

    @property
    def digest(self) -> str:
        """SHA-256 of the sorted keys: the same pairs give the same digest in every file format."""
        digest = hashlib.sha256()
        for batch in self.table.select(["key"]).to_batches(max_chunksize=1 << 16):
            digest.update("".join(map(str, batch["key"].to_pylist())).encode())
        return digest.hexdigest()

    @property
    def shard_ids(self) -> list[str]:
        count = -(-self.table.num_rows // self.rows_per_shard)
        return [f"{index:05d}" for index in range(count)]

    def shard(self, shard_id: str) -> pa.Table:
        """The rows of one shard."""
        return self.table.slice(int(shard_id) * self.rows_per_shard, self.rows_per_shard)


def read_url_list(path: Path, *, rows_per_shard: int) -> UrlList:
    """Read a list into memory (about 250 bytes a pair); raises ValueError if it is no URL list."""
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard must be at least 1, got {rows_per_shard}")
    table = _read_columns(path)
    if table.num_rows == 0:
        raise ValueError(f"{path} must hold at least one pair, got none")
    table = table.add_column(0, "key", pa.array(_keys(table), pa.string()))
    table = table.sort_by("key").combine_chunks()
    keys = table["key"]
    repeats: Any = pc.equal(keys[1:], keys[:-1])
    flags = pa.chunked_array([pa.array([False]), *repeats.chunks], pa.bool_())
    return UrlList(table=table.append_column("repeats", flags), rows_per_shard=rows_per_shard)


def pair_key(url: str, caption: str) -> str:
    """What a pair is known by in every later stage."""
    return hashlib.sha256(f"{url}\0{caption}".encode()).hexdigest()[:KEY_HEX_DIGITS]


def _keys(table: pa.Table) -> Iterable[str]:
    for batch in table.to_batches():
        urls, captions = batch["url"].to_pylist(), batch["caption"].to_pylist()
        pairs = zip(urls, captions, strict=True)
        yield from (pair_key(str(url), str(caption)) for url, caption in pairs)


def _read_columns(path: Path) -> pa.Table:
    if not path.is_file():
        raise ValueError(f"the URL list must be a file, but there is none at {path}")
    try:
        table = _read_file(path)
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        raise ValueError(f"{path} must be a readable {path.suffix} URL list: {error}") from error
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise ValueError(
            f"{path} must have the columns url and caption, but {' and '.join(missing)} "
            f"is missing; it has {', '.join(table.column_names) or 'none'}"
        )
    return pa.table({name: _as_text(table, name, path) for name in COLUMNS})


def _as_text(table: pa.Table, name: str, path: Path) -> Any:
    """A column as strings. A row without a URL or a caption is a bad row, dropped later, and no
    reason to refuse the list: nothing becomes the empty string."""
    try:
        return pc.fill_null(table[name].cast(pa.string()), pa.scalar(""))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(
            f"{path} must have text in the column {name}, got {table[name].type}"
        ) from error


def _read_file(path: Path) -> pa.Table:
    match path.suffix:
        case ".parquet":
            names = pq.read_schema(path).names
            return pq.read_table(path, columns=[name for name in COLUMNS if name in names] or None)
        case ".csv" | ".tsv":
            return pa_csv.read_csv(
                path,
                parse_options=pa_csv.ParseOptions(
                    delimiter="\t" if path.suffix == ".tsv" else ",", newlines_in_values=True
                ),
                convert_options=pa_csv.ConvertOptions(
                    column_types={name: pa.string() for name in COLUMNS}
                ),
            )
        case ".jsonl":
            return pa_json.read_json(path)
    raise ValueError(f"{path} must end in one of {', '.join(FORMATS)}, got {path.suffix!r}")
