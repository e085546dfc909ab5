"""From URLs to stored pictures, a shard at a time."""

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from pipelines.data.fetch import FetchConfig, Fetched, Resolve, fetch_all
from pipelines.data.resize import ResizeConfig, Resized, resize_picture
from pipelines.data.schema import DROPPED, RAW
from pipelines.data.stage import DatasetWriter

STAGE = "download_pairs"


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """What is fetched and what is stored of it."""

    rows_per_shard: int = 10_000
    """Pairs per shard, the unit of work and of resuming; img2dataset's default."""
    fetch: FetchConfig = field(default_factory=FetchConfig)
    resize: ResizeConfig = field(default_factory=ResizeConfig)

    def identity(self) -> dict[str, Any]:
        """What the dataset depends on: an interrupted download may go on with other speeds."""
        settings = asdict(self)
        for speed in ("concurrency", "per_host", "backoff_s"):
            del settings["fetch"][speed]
        settings["fetch"]["ports"] = list(self.fetch.ports)
        return settings


def download_shard(
    rows: pa.Table, config: DownloadConfig, resolve: Resolve | None = None
) -> tuple[pa.Table, pa.Table]:
    """Fetch and store the pictures of a `UrlList.shard`; gives (RAW, DROPPED) tables."""
    pairs = rows.to_pylist()
    fresh = [pair for pair in pairs if not pair["repeats"]]

    def store(fetched: Fetched) -> dict[str, Any]:
        if fetched.reason:
            return {"reason": fetched.reason, "detail": fetched.detail}
        resized = resize_picture(fetched.body, config.resize)
        if resized.reason:
            return {"reason": resized.reason, "detail": resized.detail}
        return _stored(resized, hashlib.sha256(fetched.body).hexdigest())

    urls = [pair["url"] for pair in fresh]
    results = fetch_all(urls, config.fetch, store, resolve)
    done = [pair | result for pair, result in zip(fresh, results, strict=True)]
    repeats = [
        pair | {"reason": "duplicate_pair", "detail": ""} for pair in pairs if pair["repeats"]
    ]
    dropped = sorted((row for row in done + repeats if "reason" in row), key=_order)
    kept = [row for row in done if "reason" not in row]
    return pa.Table.from_pylist(kept, schema=RAW), pa.Table.from_pylist(dropped, schema=DROPPED)


def commit_download(
    item: dict[str, Any], *, writer: DatasetWriter, config: DownloadConfig
) -> dict[str, Any]:
    """Download and commit one shard: `item` is its id and the columns of its rows."""
    columns = {name: item[name] for name in ("key", "url", "caption", "repeats")}
    rows = pa.table(columns)
    kept, dropped = download_shard(rows, config)
    commit = writer.commit(item["shard"], kept, dropped, rows_in=rows.num_rows, schema=RAW)
    return {"shard": commit.shard, "rows_in": commit.rows_in, "rows_out": commit.rows_out}


def _stored(resized: Resized, sha256: str) -> dict[str, Any]:
    return {
        "image": resized.image,
        "width": resized.width,
        "height": resized.height,
        "original_width": resized.original_width,
        "original_height": resized.original_height,
        "sha256": sha256,
    }


def _order(row: dict[str, Any]) -> tuple[str, bool]:
    return row["key"], row["repeats"]
