"""Files of a URL list that are damaged: named with the place, or left out and recorded."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import download_pairs
from pipelines.data.bad_files import BadFile
from pipelines.data.report import write_report
from pipelines.data.stage import Manifest
from pipelines.data.storage import Location
from pipelines.data.urls import UrlList, read_url_list
from tests.fixtures.s3_server import S3Server

ROWS = 3000


def good(path: Path, start: int = 0, rows: int = ROWS) -> Path:
    numbers = range(start, start + rows)
    table = pa.table(
        {
            "url": [f"http://a.example/{number}.jpg" for number in numbers],
            "caption": [f"picture {number * 7919 % 104729}" for number in numbers],
        }
    )
    pq.write_table(table, path, row_group_size=1000, write_page_checksum=True)
    return path


def read(place: Path | Location, on_bad_file: str = "fail") -> UrlList:
    return read_url_list(place, rows_per_shard=100, on_bad_file=on_bad_file)  # type: ignore[arg-type]


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def without_footer(data: bytes) -> bytes:
    return data[:-200] + b"PAR1"


def flipped(data: bytes) -> bytes:
    third = len(data) // 3
    return data[:third] + bytes([data[third] ^ 0xFF]) + data[third + 1 :]


def broken_footer(data: bytes) -> bytes:
    return data[:-60] + bytes(byte ^ 0x55 for byte in data[-60:-8]) + data[-8:]


DAMAGES = [
    (lambda data: b"", "byte 0 is not"),
    (lambda data: b"<html>" + data, "byte 0 is not"),
    (cut, "without b'PAR1': it is cut off"),
    (lambda data: b"PAR1", "it is cut off"),
    (without_footer, "at byte .* a footer of .* bytes is claimed|footer"),
    (broken_footer, r"a footer \(from byte [0-9,]+ on\) that is none"),
    (flipped, r"a row group 1 \(bytes [0-9,]+ to [0-9,]+\) that cannot be read"),
]


@pytest.mark.parametrize("number", range(len(DAMAGES)))
def test_damage_is_named_with_its_place(tmp_path: Path, number: int) -> None:
    damage, words = DAMAGES[number]
    file = good(tmp_path / "list.parquet")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(BadFile, match=words) as caught:
        read(file)
    assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json", ".jsonl", ".txt"])
def test_a_bad_file_among_good_ones_is_left_out_and_named(tmp_path: Path, suffix: str) -> None:
    good(tmp_path / "a.parquet", rows=10)
    good(tmp_path / "c.parquet", start=10, rows=10)
    (tmp_path / f"b{suffix}").write_bytes(b"url\n\xff\xfe{")
    with pytest.raises(BadFile, match=f"b{suffix}"):
        read(tmp_path)
    found = read(tmp_path, "quarantine")
    assert [bad.file.name for bad in found.quarantined] == [f"b{suffix}"]
    (tmp_path / f"b{suffix}").unlink()
    assert read(tmp_path).digest == found.digest


def test_a_list_of_bad_files_only_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadFile, match="cut off"):
        read(tmp_path, "quarantine")


def test_a_file_that_cannot_be_opened_is_no_bad_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").symlink_to(tmp_path)  # a directory: EISDIR, as EIO would come
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    with pytest.raises(OSError, match="directory"):
        read(tmp_path / "*.parquet", "quarantine")


def test_lists_may_lie_in_s3(bucket: str, s3_server: S3Server, tmp_path: Path) -> None:
    local = tmp_path / "lists"
    local.mkdir()
    good(local / "a.parquet", rows=10)
    (local / "b.tsv").write_text("a dog\thttp://a.example/dog.jpg\n")
    (local / "c.csv").write_text("url,caption\nhttp://a.example/cat.jpg,a cat\n")
    client = s3_server.client()
    for file in local.iterdir():
        client.put_object(Bucket=bucket, Key=f"lists/{file.name}", Body=file.read_bytes())
    client.put_object(Bucket=bucket, Key="lists/README", Body=b"not a list")
    client.put_object(Bucket=bucket, Key="lists/deeper/d.csv", Body=b"not asked for")
    place = Location(f"s3://{bucket}/lists")
    assert read(place).digest == read(local).digest
    assert read(place / "*.csv").digest == read(local / "c.csv").digest
    assert read(place / "a.parquet").digest == read(local / "a.parquet").digest
    with pytest.raises(ValueError, match="there is none at"):
        read(place / "none.csv")


def test_a_store_that_is_away_is_never_a_bad_file(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Location(f"s3://{bucket}/a.csv")
    place.put(b"url,caption\nx,y\n")

    def away(self: Location) -> bytes:
        raise ConnectionError("gave up")

    monkeypatch.setattr(Location, "read", away)
    with pytest.raises(ConnectionError):
        read(place, "quarantine")


def test_the_dataset_its_report_and_its_plan_say_what_was_left_out(tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "a.csv").write_text("url,caption\nfile:///etc/passwd,a list of users\n")
    (lists / "b.parquet").write_bytes(b"PAR1 and no more")
    job = download_pairs.PRESETS["tiny"][1]
    job = download_pairs.DownloadPairsJob(
        urls=Location(lists),
        output=Location(tmp_path / "raw"),
        download=job.download,
        on_bad_file="quarantine",
    )
    assert any(
        "left out, its pairs are in no count" in line for line in download_pairs.describe(job)
    )
    urls = download_pairs._read_list(job)
    writer = download_pairs._writer(job, urls)
    writer.claim()
    rows = download_pairs.pack(urls.shard("00000"))
    item = {"shard": "00000", "rows": rows}
    download_pairs.commit_download(item, writer=writer, config=job.download)
    manifest = writer.seal()
    (left_out,) = manifest.config["quarantined"]
    assert left_out["file"] == "b.parquet"
    assert "cut off" in left_out["fault"]
    write_report(tmp_path / "report.html", [Manifest.load(tmp_path / "raw")])
    assert (
        "Left out, its pairs are in no count: b.parquet" in (tmp_path / "report.html").read_text()
    )
