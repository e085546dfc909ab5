"""URL lists: one meaning in every format and order."""

import csv
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.url_formats import UrlColumns
from pipelines.data.urls import pair_key, read_url_list

PAIRS = [
    ("http://a.example/1.jpg", "a dog, running"),
    ("http://a.example/2.jpg", 'a "quoted" cat'),
    ("http://a.example/3.jpg", "two\nlines"),
    ("http://a.example/1.jpg", "another caption"),
    ("http://a.example/1.jpg", "a dog, running"),
    ("http://a.example/4.jpg", "яблоко"),
]


def write(path: Path, pairs: list[tuple[str, str]]) -> Path:
    if path.suffix == ".parquet":
        urls, captions = zip(*pairs, strict=True)
        pq.write_table(pa.table({"caption": captions, "n": range(len(pairs)), "url": urls}), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"caption": c, "url": u, "n": 1} for u, c in pairs]))
    elif path.suffix == ".jsonl":
        lines = [json.dumps({"url": url, "caption": caption}) for url, caption in pairs]
        path.write_text("\n".join(lines))
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([("url", "caption"), *pairs])
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv", ".json", ".jsonl"])
def test_every_format_and_order_gives_the_same_shards(tmp_path: Path, suffix: str) -> None:
    expected = read_url_list(write(tmp_path / "list.parquet", PAIRS), rows_per_shard=4)
    shuffled = random.Random(1).sample(PAIRS, len(PAIRS))
    found = read_url_list(write(tmp_path / f"other{suffix}", shuffled), rows_per_shard=4)
    assert found.digest == expected.digest
    assert found.shard_ids == ["00000", "00001"]
    for shard in found.shard_ids:
        assert found.shard(shard).to_pylist() == expected.shard(shard).to_pylist()


def test_the_shards_hold_every_row_once_and_the_second_of_a_pair_is_marked(tmp_path: Path) -> None:
    urls = read_url_list(write(tmp_path / "list.csv", PAIRS), rows_per_shard=4)
    rows = [row for shard in urls.shard_ids for row in urls.shard(shard).to_pylist()]
    assert sorted((row["url"], row["caption"]) for row in rows) == sorted(PAIRS)
    assert [row["key"] for row in rows] == sorted(pair_key(*pair) for pair in PAIRS)
    repeated = [(row["url"], row["caption"]) for row in rows if row["repeats"]]
    assert repeated == [PAIRS[0]]


def test_one_row_is_a_list(tmp_path: Path) -> None:
    urls = read_url_list(write(tmp_path / "list.csv", PAIRS[:1]), rows_per_shard=10)
    assert urls.table["repeats"].to_pylist() == [False]


def test_a_row_without_url_or_caption_is_kept_for_the_stages_to_drop(tmp_path: Path) -> None:
    table = pa.table({"url": ["http://a.example/1.jpg", None], "caption": [None, "a dog"]})
    pq.write_table(table, tmp_path / "list.parquet")
    rows = read_url_list(tmp_path / "list.parquet", rows_per_shard=10).table.to_pylist()
    assert {(row["url"], row["caption"]) for row in rows} == {
        ("http://a.example/1.jpg", ""),
        ("", "a dog"),
    }


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("list.csv", "link,caption\nx,y\n", ["url is missing", "link, caption"]),
        ("list.csv", "a,b\nx,y\n", ["url and caption", "a, b"]),
        ("list.csv", "url,caption\n", ["at least one pair"]),
        ("list.csv", "", ["readable .csv"]),
        ("list.xlsx", "url,caption\nx,y\n", [".parquet, .csv, .tsv, .json, .jsonl, .txt", ".xlsx"]),
        ("list.parquet", "this is no parquet", ["readable .parquet"]),
        ("list.jsonl", "{not json", ["readable .jsonl"]),
        ("list.jsonl", '{"url": "x", "caption": "y"}\n{bad', ["list.jsonl (line 2)"]),
        ("list.json", '[{"url": "x"},\n{]', ["list.json (line 2)"]),
        ("list.json", '{"url": "x"}', ["list of objects"]),
        ("list.csv", "url,caption\na,b\na,b,c\n", ["Row #3", "Expected 2 columns"]),
        ("list.jsonl", '{"url": {"a": 1}, "caption": "x"}', ["must have text in the column url"]),
    ],
)
def test_what_is_no_url_list_is_refused_in_words(
    tmp_path: Path, name: str, content: str, words: list[str]
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="must") as refusal:
        read_url_list(tmp_path / name, rows_per_shard=10)
    for word in words:
        assert word in str(refusal.value)


def test_a_missing_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is none at"):
        read_url_list(tmp_path / "none.csv", rows_per_shard=10)


def test_conceptual_captions_layout_needs_no_header_and_quotes_are_letters(tmp_path: Path) -> None:
    pairs = [('a "dog', "http://a.example/1"), ("it's 5\" wide", "https://a.example/2")]
    (tmp_path / "cc.tsv").write_text("".join(f"{c}\t{u}\n" for c, u in pairs))
    (tmp_path / "swapped.tsv").write_text("".join(f"{u}\t{c}\n" for c, u in pairs))
    for name in ("cc.tsv", "swapped.tsv"):
        rows = read_url_list(tmp_path / name, rows_per_shard=10).table.to_pylist()
        assert {(row["caption"], row["url"]) for row in rows} == set(pairs)


def test_text_is_a_url_a_line_with_a_caption_or_none(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("http://a.example/1\r\n\nhttp://a.example/2\ta dog\n")
    rows = read_url_list(tmp_path / "l.txt", rows_per_shard=10).table.to_pylist()
    assert {(row["url"], row["caption"]) for row in rows} == {
        ("http://a.example/1", ""),
        ("http://a.example/2", "a dog"),
    }


def test_a_directory_and_a_pattern_are_one_list(tmp_path: Path) -> None:
    whole = read_url_list(write(tmp_path / "whole.csv", PAIRS), rows_per_shard=4)
    parts = tmp_path / "parts"
    parts.mkdir()
    write(parts / "a.csv", PAIRS[:2])
    write(parts / "b.parquet", PAIRS[2:])
    (parts / "README").write_text("not a list")
    for path in (parts, parts / "[ab].*"):
        assert read_url_list(path, rows_per_shard=4).digest == whole.digest


def test_the_columns_may_have_other_names(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("URL,TEXT,url\nhttp://a.example/1,a dog,no\n")
    columns = UrlColumns(url="URL", caption="TEXT")
    table = read_url_list(tmp_path / "l.csv", rows_per_shard=4, columns=columns).table
    assert table.select(["url", "caption"]).to_pylist() == [
        {"url": "http://a.example/1", "caption": "a dog"}
    ]


def test_a_line_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_bytes(b"url,caption\nx,y\nx,\xff\xfe\n")
    with pytest.raises(ValueError, match=r"l\.csv \(line 3\)"):
        read_url_list(tmp_path / "l.csv", rows_per_shard=4)
