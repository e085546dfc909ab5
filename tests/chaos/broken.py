"""Wrong protocols in the place of the right one: the checks of the schedules must find them."""

import hashlib
import json
import uuid
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data import s3, stage
from pipelines.data.storage import Location


def names_first() -> None:
    """The record is there before the files that it names."""
    later: list[tuple[Location, bytes]] = []
    right = Location.create_once

    def write(file: Location, table: pa.Table) -> str:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", use_dictionary=False)
        later.append((file, sink.getvalue().to_pybytes()))
        return hashlib.sha256(later[-1][1]).hexdigest()

    def create_once(self: Location, data: bytes) -> bool:
        won = right(self, data)
        while later:
            file, content = later.pop(0)
            file.put(content)
        return won

    stage.write_shard = write
    Location.create_once = create_once  # type: ignore[method-assign]


def one_name_a_shard() -> None:
    """All attempts have one name, and what another has written there is taken as it is."""
    right = stage.write_shard

    def write(file: Location, table: pa.Table) -> str:
        if not file.exists():
            right(file, table)
        return hashlib.sha256(file.read()).hexdigest()

    stage.write_shard = write
    uuid.uuid4 = lambda: uuid.UUID(int=0)


def loser_deletes() -> None:
    """A refused record's attempt is deleted, without a look at whose record is there."""
    right = Location.create_once

    def put_if(bucket: str, key: str, data: bytes, **condition: str) -> bool:
        def call() -> Any:
            return s3.client().put_object(Bucket=bucket, Key=key, Body=data, **condition)

        try:
            s3._retry(call, bucket, key)
        except (FileExistsError, FileNotFoundError):
            return False
        return True

    def create_once(self: Location, data: bytes) -> bool:
        won = right(self, data)
        before, records, _ = str(self).rpartition(f"/{stage.COMMITS}/")
        if records and not won:
            offered = json.loads(data)
            for name in (offered["file"], offered["dropped_file"]):
                (Location(before) / name).delete()
        return won

    s3._put_if = put_if
    Location.create_once = create_once  # type: ignore[method-assign]


WRONG: dict[str, Callable[[], None]] = {
    "names_first": names_first,
    "one_name_a_shard": one_name_a_shard,
    "loser_deletes": loser_deletes,
}
