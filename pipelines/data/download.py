"""From URLs to stored pictures, a shard at a time."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import pyarrow as pa

from pipelines.data import killable
from pipelines.data.causes import has_cause
from pipelines.data.collapse import CollapseConfig, CollapseWatch
from pipelines.data.fetch import FetchConfig, Fetched, Resolve, fetch_all
from pipelines.data.img2dataset_engine import img2dataset_results
from pipelines.data.killable import Resize
from pipelines.data.resize import ResizeConfig, resize_picture
from pipelines.data.schema import DROPPED, RAW
from pipelines.data.stage import DatasetWriter, Manifest
from pipelines.data.travelling import unpack

STAGE = "download_pairs"
NEVER_ASKED = frozenset({"bad_url", "forbidden_scheme", "forbidden_address"})


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """What is fetched and what is stored of it."""

    rows_per_shard: int = 10_000
    """Pairs per shard, the unit of work and of resuming; img2dataset's default."""
    fetch: FetchConfig = field(default_factory=FetchConfig)
    resize: ResizeConfig = field(default_factory=ResizeConfig)
    collapse: CollapseConfig = field(default_factory=CollapseConfig)
    engine: Literal["guarded", "img2dataset"] = "guarded"
    """Which fetches; img2dataset's own way has no guards, and is for trusted lists only."""
    trust_urls: bool = False
    """All URLs, and all that they may redirect to, are trusted; engine img2dataset needs it."""

    def __post_init__(self) -> None:
        if self.rows_per_shard < 1:
            raise ValueError(f"rows_per_shard must be at least 1, got {self.rows_per_shard}")
        if self.engine == "img2dataset" and not self.trust_urls:
            raise ValueError(
                "engine img2dataset must have --download.trust-urls: it reads file:// and data: "
                "URLs, asks inner addresses, follows redirects anywhere, and has no cap on bytes, "
                "total time or pixels before decoding"
            )

    def identity(self) -> dict[str, Any]:
        """What the dataset depends on: an interrupted download may go on with other speeds."""
        settings = asdict(self)
        for speed in ("concurrency", "per_host", "backoff_s"):
            del settings["fetch"][speed]
        del settings["collapse"], settings["trust_urls"]
        settings["fetch"]["ports"] = list(self.fetch.ports)
        return settings


def download_shard(
    rows: pa.Table,
    config: DownloadConfig,
    resolve: Resolve | None = None,
    resize: Resize | None = None,
) -> tuple[pa.Table, pa.Table]:
    """Fetch and store the pictures of a `UrlList.shard`; gives (RAW, DROPPED) tables.

    `resize` is one of `killable.resizer`, without which a picture may kill this process.
    """
    pairs = rows.to_pylist()
    fresh = [pair for pair in pairs if not pair["repeats"]]
    results = _results([pair["url"] for pair in fresh], config, resolve, resize)
    done = [pair | result for pair, result in zip(fresh, results, strict=True)]
    repeats = [
        pair | {"reason": "duplicate_pair", "detail": ""} for pair in pairs if pair["repeats"]
    ]
    dropped = sorted((row for row in done + repeats if "reason" in row), key=_order)
    kept = [row for row in done if "reason" not in row]
    return pa.Table.from_pylist(kept, schema=RAW), pa.Table.from_pylist(dropped, schema=DROPPED)


def retry_shard(
    kept: pa.Table,
    dropped: pa.Table,
    config: DownloadConfig,
    causes: Sequence[str],
    resolve: Resolve | None = None,
    resize: Resize | None = None,
) -> tuple[pa.Table, pa.Table]:
    """Fetch the dropped rows with these causes again; gives the new (RAW, DROPPED) tables.

    What was kept stays, and what is recovered joins it in the order of the keys.
    """
    rows = dropped.to_pylist()
    again = [index for index, row in enumerate(rows) if has_cause(row["reason"], causes)]
    results = _results([rows[index]["url"] for index in again], config, resolve, resize)
    done = dict(zip(again, results, strict=True))
    recovered = [rows[index] | result for index, result in done.items() if "image" in result]
    # A recovered row's old reason is gone; a row that failed again has its newest one.
    left = [
        row | done.get(index, {})
        for index, row in enumerate(rows)
        if "reason" in done.get(index, row)
    ]
    both = pa.concat_tables([kept, pa.Table.from_pylist(recovered, schema=RAW)])
    return both.sort_by("key"), pa.Table.from_pylist(left, schema=DROPPED)


def commit_download(
    item: dict[str, Any], *, writer: DatasetWriter, config: DownloadConfig
) -> dict[str, Any]:
    """Download and commit one shard: `item` is its id and its packed rows.

    Raises NetworkCollapsed.
    """
    rows = unpack(item["rows"])
    with _attempt(writer, item["shard"], config) as resize:
        kept, dropped = download_shard(rows, config, resize=resize)
        return _commit(writer, item["shard"], kept, dropped, rows.num_rows)


def commit_retry(
    item: dict[str, Any],
    *,
    writer: DatasetWriter,
    config: DownloadConfig,
    old: Manifest,
    causes: Sequence[str],
) -> dict[str, Any]:
    """Retry and commit one shard of a finished download; see `commit_download`."""
    kept, dropped = old.read(item["shard"]), old.read_dropped(item["shard"])
    rows_in = kept.num_rows + dropped.num_rows
    with _attempt(writer, item["shard"], config) as resize:
        kept, dropped = retry_shard(kept, dropped, config, causes, resize=resize)
        return _commit(writer, item["shard"], kept, dropped, rows_in)


@contextmanager
def _attempt(writer: DatasetWriter, shard: str, config: DownloadConfig) -> Iterator[Resize]:
    """With this the pictures of an attempt are stored."""
    with (
        killable.attempt(writer.place, shard) as careful,
        killable.resizer(config.resize, careful=careful) as resize,
    ):
        yield resize


def _results(
    urls: Sequence[str],
    config: DownloadConfig,
    resolve: Resolve | None,
    resize: Resize | None,
) -> list[dict[str, Any]]:
    """For each URL the columns of a stored picture, or reason and detail."""
    watch = CollapseWatch(config.collapse)
    if config.engine == "img2dataset":
        return img2dataset_results(urls, config.fetch, config.resize, watch)

    store_as = resize or partial(resize_picture, config=config.resize)

    def store(fetched: Fetched) -> dict[str, Any]:
        if fetched.reason not in NEVER_ASKED:
            watch.saw(fetched.reason)
        if fetched.reason:
            return {"reason": fetched.reason, "detail": fetched.detail}
        digest = hashlib.sha256(fetched.body).hexdigest()
        return store_as(fetched.body).columns(digest)

    return fetch_all(urls, config.fetch, store, resolve)


def _commit(
    writer: DatasetWriter, shard: str, kept: pa.Table, dropped: pa.Table, rows_in: int
) -> dict[str, Any]:
    commit = writer.commit(shard, kept, dropped, rows_in=rows_in, schema=RAW)
    return {"shard": commit.shard}


def _order(row: dict[str, Any]) -> tuple[str, bool]:
    return row["key"], row["repeats"]
