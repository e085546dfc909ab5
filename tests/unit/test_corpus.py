"""The corpus that ships, and the small web that serves it."""

import io
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.corpus import build_fluent_emoji
from pipelines.corpus.web import CorpusWeb
from pipelines.data.urls import read_url_list
from tests.fixtures.datasets import CORPUS

MOST_BYTES = 10 * 1000 * 1000
THUMBNAIL = (16, 16)


def test_the_corpus_is_small_whole_and_without_repeats() -> None:
    assert CORPUS.stat().st_size <= MOST_BYTES
    rows = pq.read_table(CORPUS).to_pylist()
    assert len(rows) > 1800
    assert [row["key"] for row in rows] == sorted(row["key"] for row in rows)
    assert len({row["caption"] for row in rows}) == len(rows)
    assert len({row["image"] for row in rows}) == len(rows)
    assert sorted(row["rank"] for row in rows) == list(range(len(rows)))
    assert not any("1F3F" in row["key"][6:] and "skin" in row["name"] for row in rows)


def test_every_picture_is_128_pixels_on_white() -> None:
    for row in pq.read_table(CORPUS, columns=["image"]).to_pylist():
        picture = Image.open(io.BytesIO(row["image"]))
        assert (picture.size, picture.mode, picture.format) == ((128, 128), "RGB", "WEBP")


def test_the_first_256_pictures_can_be_told_apart_at_a_glance() -> None:
    table = pq.read_table(CORPUS, columns=["rank", "image"]).sort_by("rank").slice(0, 256)
    thumbnails = np.stack(
        [
            np.asarray(Image.open(io.BytesIO(image)).resize(THUMBNAIL, Image.Resampling.BOX))
            for image in table["image"].to_pylist()
        ]
    ).astype(np.float32)
    flat = thumbnails.reshape(len(thumbnails), -1)
    distances = np.sqrt(((flat[:, None] - flat[None]) ** 2).mean(-1))
    np.fill_diagonal(distances, np.inf)
    assert distances.min() > 30


def test_the_list_is_a_function_of_port_and_number(tmp_path: Path) -> None:
    with CorpusWeb(0, 20) as web:
        first = web.url_list(tmp_path / "one.parquet").read_bytes()
        port = web.port
    with CorpusWeb(port, 20) as web:
        assert web.url_list(tmp_path / "two.parquet").read_bytes() == first
    urls = read_url_list(tmp_path / "one.parquet", rows_per_shard=100)
    assert urls.table.num_rows == 29
    assert sum(urls.table["repeats"].to_pylist()) == 1


def test_the_web_serves_pictures_and_faults(tmp_path: Path) -> None:
    with CorpusWeb(0, 3) as web:
        base = f"http://127.0.0.1:{web.port}"
        for row in web.rows:
            with urllib.request.urlopen(f"{base}/emoji/{row['key']}.webp") as answer:
                assert answer.read() == row["image"]
        bad = {row.name: row.url for row in web.bad_rows}
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(bad["not_found"])
        with urllib.request.urlopen(bad["banner"]) as answer:
            assert Image.open(io.BytesIO(answer.read())).size == (1200, 100)


def test_a_taken_port_and_too_many_pictures_are_said_plainly() -> None:
    with (
        CorpusWeb(0, 3) as web,
        pytest.raises(ValueError, match=f"port must be free, .*{web.port}"),
    ):
        CorpusWeb(web.port, 3)
    with pytest.raises(ValueError, match=r"pictures must be in 1\.\.\d+, got 5000"):
        CorpusWeb(0, 5000)


@pytest.mark.parametrize(
    ("name", "tags", "expected"),
    [
        ("red apple", ["apple", "fruit", "food"], "a picture of a red apple, food and fruit"),
        ("flag: Peru", ["PE", "flag"], "a picture of the flag of Peru"),
        ("man: bald", ["adult", "bald", "man"], "a picture of a man with bald head"),
        ("grapes", ["grape", "fruit", "dionysus"], "a picture of grapes, fruit"),
        ("keycap: 3", ["keycap"], "a picture of a key with the sign 3 on it"),
    ],
)
def test_a_caption_is_what_a_person_would_write(name: str, tags: list[str], expected: str) -> None:
    usage = Counter({"fruit": 20, "food": 100, "flag": 250, "dionysus": 1})
    assert build_fluent_emoji.caption(name, tags, usage) == expected
