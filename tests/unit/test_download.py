"""A shard of a download: retried by cause, stopped when the network dies, by either engine."""

import io
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines.data.causes import reason_said
from pipelines.data.collapse import CollapseConfig, NetworkCollapsed
from pipelines.data.download import DownloadConfig, download_shard, retry_shard
from pipelines.data.fetch import FetchConfig
from pipelines.data.resize import ResizeConfig, resize_picture
from pipelines.data.schema import RAW
from pipelines.data.urls import pair_key
from tests.fixtures.evil_web import EvilServer, running_evil_web

CONFIG = DownloadConfig(
    fetch=FetchConfig(allow_loopback=True, timeout_s=5, retries=0, concurrency=4),
    resize=ResizeConfig(short_side=32, encoding="png"),
)


@pytest.fixture
def server() -> Iterator[EvilServer]:
    with running_evil_web() as server:
        buffer = io.BytesIO()
        Image.new("RGB", (40, 50), "teal").save(buffer, "PNG")
        server.picture = buffer.getvalue()
        yield server


def shard(urls: list[str]) -> pa.Table:
    keys = [pair_key(url, "a dog") for url in urls]
    rows = [
        {"key": key, "url": url, "caption": "a dog", "repeats": False}
        for key, url in sorted(zip(keys, urls, strict=True))
    ]
    return pa.Table.from_pylist(rows)


def test_only_the_named_causes_are_fetched_again_and_no_row_is_lost(server: EvilServer) -> None:
    paths = [f"/{kind}?{n}" for kind in ("picture", "outage", "none") for n in range(4)]
    rows = shard([server.url(path) for path in paths])
    kept, dropped = download_shard(rows, CONFIG)
    assert (kept.num_rows, dropped.num_rows) == (4, 8)

    server.recovered = True
    asked = dict(server.asked)
    both, left = retry_shard(kept, dropped, CONFIG, ["5xx", "timeout"])
    again = {path: server.asked[path] - asked[path] for path in paths}
    assert again == {path: int(path.startswith("/outage")) for path in paths}
    assert both.schema == RAW
    assert set(left["reason"].to_pylist()) == {"http_404"}
    assert both["key"].to_pylist() == sorted(both["key"].to_pylist())
    assert sorted(both["key"].to_pylist() + left["key"].to_pylist()) == rows["key"].to_pylist()
    # As if it had been fetched at the first time.
    assert download_shard(rows, CONFIG)[0].equals(both)


def test_a_row_that_fails_again_has_its_newest_reason(server: EvilServer) -> None:
    kept, dropped = download_shard(shard([server.url("/outage")]), CONFIG)
    server.alive_answers = 0
    both, left = retry_shard(kept, dropped, CONFIG, ["5xx"])
    assert both.num_rows == 0
    assert left["reason"].to_pylist() == ["connection_failed"]


def test_a_network_that_dies_midway_writes_no_row_off(server: EvilServer) -> None:
    config = replace(CONFIG, collapse=CollapseConfig(window=10, share=0.9))
    rows = shard([server.url(f"/picture?{n}") for n in range(200)])
    server.alive_answers = 40
    with pytest.raises(NetworkCollapsed, match=r"of the last 10 fetches .* connection_failed"):
        download_shard(rows, config)
    assert sum(server.asked.values()) < 100  # the rest was not even asked


def test_a_resolver_that_dies_is_noticed_and_a_window_of_zero_never_stops() -> None:
    async def dead(host: str, port: int) -> list[str]:
        raise OSError("the resolver is gone")

    rows = shard([f"http://host-{n}.example/x.jpg" for n in range(30)])
    watched = replace(CONFIG, collapse=CollapseConfig(window=20))
    with pytest.raises(NetworkCollapsed):
        download_shard(rows, watched, dead)
    unwatched = replace(CONFIG, collapse=CollapseConfig(window=0))
    assert download_shard(rows, unwatched, dead)[1].num_rows == 30


def test_bad_urls_and_missing_pictures_are_no_dead_network(server: EvilServer) -> None:
    config = replace(CONFIG, collapse=CollapseConfig(window=5, share=0.5))
    urls = [f"file:///{n}" for n in range(10)] + [server.url(f"/none?{n}") for n in range(10)]
    assert download_shard(shard(urls), config)[1].num_rows == 20


def test_img2dataset_needs_trust_and_gives_the_same_columns_and_pictures(
    server: EvilServer,
) -> None:
    with pytest.raises(ValueError, match=r"must have --download\.trust-urls: it reads file://"):
        DownloadConfig(engine="img2dataset")
    rows = shard([server.url(path) for path in ("/picture", "/none", "/broken", "/empty")])
    theirs = replace(CONFIG, engine="img2dataset", trust_urls=True)
    kept, dropped = download_shard(rows, theirs)
    assert kept.equals(download_shard(rows, CONFIG)[0])
    assert sorted(dropped["reason"].to_pylist()) == ["broken_picture", "http_404", "http_503"]


def test_its_messages_become_our_reasons() -> None:
    assert reason_said("HTTP Error 404: Not Found") == "http_404"
    assert reason_said("<urlopen error timed out>") == "timeout"
    assert reason_said("<urlopen error [Errno -2] Name or service not known>") == "unknown_host"
    assert reason_said("something new") == "download_failed"


@pytest.mark.parametrize(("encoding", "quality"), [("jpg", 95), ("webp", 90), ("png", 6)])
def test_the_stored_bytes_are_those_of_img2datasets_resizer(encoding: str, quality: int) -> None:
    from img2dataset.resizer import Resizer

    theirs = Resizer(64, "keep_ratio", True, encode_format=encoding, encode_quality=quality)
    rng = np.random.default_rng(0)
    config = ResizeConfig(short_side=64, encoding=encoding, quality=quality)  # type: ignore[arg-type]
    for _ in range(40):
        pixels = rng.integers(0, 255, (*rng.integers(1, 300, 2), 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        assert resize_picture(buffer.getvalue(), config).image == theirs(buffer)[0]
