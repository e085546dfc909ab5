"""URL lists: the door through which pairs come in.

The pairs of a list (see url_formats.py) are sorted by key and cut in shards, so that a shard is a
function of the list's content: not of the list's order, its format or the time.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data.bad_files import BadFile, OnBadFile
from pipelines.data.storage import Location
from pipelines.data.url_formats import PAIR, UrlColumns, list_files, read_pairs

KEY_HEX_DIGITS = 32
DEFAULT_COLUMNS = UrlColumns()


@dataclass(frozen=True, kw_only=True)
class UrlList:
    """Pairs sorted by key; `table` has key, url, caption and `repeats`: the same pair as above."""

    table: pa.Table
    rows_per_shard: int
    quarantined: list[BadFile] = field(default_factory=list)
    """Files that were left out, by name; how many pairs they had is not known."""

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


def read_url_list(
    where: Path | Location,
    *,
    rows_per_shard: int,
    columns: UrlColumns = DEFAULT_COLUMNS,
    on_bad_file: OnBadFile = "fail",
) -> UrlList:
    """Read a file, all lists of a directory, or what a pattern names, on disk or in S3.

    Raises BadFile for the first file that is no list; `quarantine` leaves such files out. Whatever
    else stops the reading stops it in both cases: a store that is away says nothing about a file.

    The driver holds the whole list, about 250 bytes a pair: ten million take 2.5 GB. Cut a longer
    one, and download the parts into outputs of their own.
    """
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard must be at least 1, got {rows_per_shard}")
    tables, quarantined = [PAIR.empty_table()], []
    for file in list_files(Location(where)):
        try:
            tables.append(read_pairs(file, columns))
        except BadFile as error:
            if on_bad_file == "fail":
                raise
            quarantined.append(error)
    table = pa.concat_tables(tables)
    if table.num_rows == 0:
        if quarantined:
            raise quarantined[0]
        raise ValueError(f"{where} must hold at least one pair, got none")
    table = table.add_column(0, "key", pa.array(_keys(table), pa.string()))
    table = table.sort_by("key").combine_chunks()
    keys = table["key"]
    repeats: Any = pc.equal(keys[1:], keys[:-1])
    flags = pa.chunked_array([pa.array([False]), *repeats.chunks], pa.bool_())
    return UrlList(
        table=table.append_column("repeats", flags),
        rows_per_shard=rows_per_shard,
        quarantined=quarantined,
    )


def pair_key(url: str, caption: str) -> str:
    """What a pair is known by in every later stage."""
    return hashlib.sha256(f"{url}\0{caption}".encode()).hexdigest()[:KEY_HEX_DIGITS]


def _keys(table: pa.Table) -> Iterable[str]:
    for batch in table.to_batches():
        urls, captions = batch["url"].to_pylist(), batch["caption"].to_pylist()
        pairs = zip(urls, captions, strict=True)
        yield from (pair_key(str(url), str(caption)) for url, caption in pairs)
