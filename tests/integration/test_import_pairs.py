"""img2dataset's output goes the way of our own downloads, on a real Ray, and only once."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from img2dataset.writer import WebDatasetSampleWriter
from PIL import Image

from jobs import filter_pairs, import_pairs
from pipelines.data.report import lineage
from pipelines.data.stage import Manifest
from tests.fixtures.datasets import CORPUS

PER_TAR = 12


def foreign(folder: Path) -> None:
    """Two tars with their Parquet files; one row of each was not downloaded."""
    rows = pq.read_table(CORPUS, columns=["caption", "image"]).slice(0, 2 * PER_TAR).to_pylist()
    names = ("caption", "url", "key", "status", "error_message")
    schema = pa.schema([(name, pa.string()) for name in names])
    for shard in range(2):
        writer = WebDatasetSampleWriter(shard, str(folder), True, 5, schema, "png")
        for number, row in enumerate(rows[shard * PER_TAR :][:PER_TAR]):
            meta = {
                "caption": row["caption"],
                "url": f"http://a.example/{shard}/{number}",
                "key": f"{shard:05d}{number:04d}",
                "status": "success" if number else "failed_to_download",
                "error_message": None if number else "HTTP Error 404: Not Found",
            }
            buffer = io.BytesIO()
            Image.open(io.BytesIO(row["image"])).save(buffer, "PNG")
            image = buffer.getvalue() if number else None
            writer.write(image, meta["key"], meta["caption"], meta)
        writer.close()


def test_an_import_is_filtered_like_a_download_and_done_once(
    ray_cluster: None, tmp_path: Path
) -> None:
    images, raw = tmp_path / "images", tmp_path / "raw"
    images.mkdir()
    foreign(images)
    line = ["tiny", "--images", str(images), "--output", str(raw)]
    assert import_pairs.main(line) == 0
    manifest = Manifest.load(raw, stage="import_pairs")
    assert (manifest.rows_in, manifest.dropped) == (2 * PER_TAR, {"http_404": 2})
    before = manifest.digest
    assert import_pairs.main(line) == 0
    assert Manifest.load(raw).digest == before
    filtered = tmp_path / "filtered"
    assert filter_pairs.main(["tiny", "--raw", str(raw), "--output", str(filtered)]) == 0
    chain = lineage(Manifest.load(filtered, stage="filter_pairs"))
    assert [part.stage for part in chain] == ["import_pairs", "filter_pairs"]
    page = (filtered / "report.html").read_text()
    assert "import_pairs: 24 in =" in page
    with (images / "00001.tar").open("ab") as file:
        file.write(b"more")
    assert import_pairs.main(line) == 2  # another input into the same output


def test_a_shard_of_a_bad_file_is_left_out_and_named(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, raw = tmp_path / "images", tmp_path / "raw"
    images.mkdir()
    foreign(images)
    tar = images / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:-9000])
    line = ["tiny", "--images", str(images), "--output", str(raw)]
    assert import_pairs.main(line) == 2
    assert f"{tar} must be a whole tar, but it is cut off" in capsys.readouterr().err
    line = [*line[:-1], str(tmp_path / "rest"), "--on-bad-file", "quarantine"]
    assert import_pairs.main(line) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["quarantined"] == 1
    manifest = Manifest.load(tmp_path / "rest")
    assert manifest.rows_in == PER_TAR
    (left_out,) = manifest.config["quarantined"]
    assert left_out["file"] == "00001.tar"
    assert "Left out, its pairs are in no count: 00001.tar" in (
        (tmp_path / "rest" / "report.html").read_text()
    )
