"""img2dataset's outputs, written by its own writers, as our raw rows."""

import hashlib
import io
import pickle
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from pipelines.data.bad_files import BadFile
from pipelines.data.importing import (
    ImportConfig,
    digest,
    drop_reason,
    import_shard,
    shard_names,
    sound_shards,
)
from pipelines.data.resize import ResizeConfig
from pipelines.data.schema import DROPPED, RAW
from pipelines.data.storage import Location
from pipelines.data.urls import pair_key

CONFIG = ImportConfig(resize=ResizeConfig(short_side=32))
ERRORS = {
    "HTTP Error 404: Not Found": "http_404",
    "HTTP Error 503: Service Unavailable": "http_503",
    "<urlopen error timed out>": "timeout",
    "The read operation timed out": "timeout",
    "<urlopen error [Errno -2] Name or service not known>": "unknown_host",
    "<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed>": "tls_failed",
    "<urlopen error [Errno 111] Connection refused>": "connection_failed",
    "something new": "download_failed",
}


def jpeg(side: int, colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def rows() -> list[tuple[bytes | None, dict]]:
    good = jpeg(64)
    told = [
        (good, {"status": "success", "sha256": hashlib.sha256(b"as fetched").hexdigest()}),
        (jpeg(64)[:300], {"status": "success"}),
        (None, {"status": "failed_to_resize", "error_message": "Image decoding error"}),
    ] + [(None, {"status": "failed_to_download", "error_message": message}) for message in ERRORS]
    return [
        (
            image,
            {
                "caption": f"caption {n}",
                "url": f"http://a.example/{n}",
                "key": f"{n:09d}",
                "status": None,
                "error_message": None,
                "width": 64,
                "height": 64,
                "original_width": 640,
                "original_height": 480,
                "sha256": None,
            }
            | meta,
        )
        for n, (image, meta) in enumerate(told)
    ]


@pytest.fixture(params=["webdataset", "parquet"])
def images(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    from img2dataset.writer import ParquetSampleWriter, WebDatasetSampleWriter

    names = {"width": pa.int32(), "height": pa.int32()}
    names |= {"original_width": pa.int32(), "original_height": pa.int32()}
    schema = pa.schema([(name, names.get(name, pa.string())) for name in rows()[0][1]])
    kind = WebDatasetSampleWriter if request.param == "webdataset" else ParquetSampleWriter
    writer = kind(0, str(tmp_path), True, 5, schema, "jpg")
    for image, meta in rows():
        writer.write(image, meta["key"], meta["caption"], meta)
    writer.close()
    return tmp_path


def test_every_row_is_kept_or_dropped_with_our_reason(images: Path) -> None:
    assert shard_names(images) == ["00000"]
    kept, dropped = import_shard(images, "00000", CONFIG)
    assert kept.schema.equals(RAW)
    assert dropped.schema.equals(DROPPED)
    assert kept.num_rows + dropped.num_rows == len(rows())
    (row,) = kept.to_pylist()
    assert row["key"] == pair_key("http://a.example/0", "caption 0")
    assert row["sha256"] == hashlib.sha256(b"as fetched").hexdigest()
    assert (row["original_width"], row["original_height"], row["width"]) == (640, 480, 32)
    assert Image.open(io.BytesIO(row["image"])).size == (32, 32)
    found = {entry["caption"]: entry["reason"] for entry in dropped.to_pylist()}
    assert found["caption 1"] == "broken_picture"
    assert found["caption 2"] == "resize_failed"
    for number, reason in enumerate(ERRORS.values(), start=3):
        assert found[f"caption {number}"] == reason


def test_the_same_output_gives_the_same_tables(images: Path) -> None:
    first, second = (import_shard(images, "00000", CONFIG) for _ in range(2))
    assert first[0].equals(second[0])
    assert first[1].equals(second[1])


def test_more_rows_than_a_shard_may_have_are_refused(images: Path) -> None:
    with pytest.raises(ValueError, match="at most 2 rows"):
        import_shard(images, "00000", ImportConfig(max_rows_per_shard=2))


def test_a_tar_alone_is_enough_and_a_cut_one_is_refused(tmp_path: Path) -> None:
    from img2dataset.writer import WebDatasetSampleWriter

    schema = pa.schema([(name, pa.string()) for name in ("caption", "url", "key")])
    writer = WebDatasetSampleWriter(0, str(tmp_path), True, 5, schema, "jpg")
    writer.write(jpeg(64), "0", "a red square", {"caption": "a", "url": "u", "key": "0"})
    writer.close()
    (tmp_path / "00000.parquet").unlink()
    kept, dropped = import_shard(tmp_path, "00000", CONFIG)
    assert (kept.num_rows, dropped.num_rows) == (1, 0)
    assert kept["caption"].to_pylist() == ["a red square"]
    tar = tmp_path / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:-9000])
    with pytest.raises(ValueError, match="cut off"):
        import_shard(tmp_path, "00000", CONFIG)


def test_a_bad_file_costs_its_shard_or_ends_the_import(images: Path) -> None:
    before = digest(images, shard_names(images))
    cut = images / "00001.parquet"
    cut.write_bytes((images / "00000.parquet").read_bytes()[:-20])
    assert sound_shards(images, CONFIG, "fail") == (["00000", "00001"], [])
    with pytest.raises(BadFile) as refused:
        import_shard(images, "00001", CONFIG)
    sound, (bad,) = sound_shards(images, CONFIG, "quarantine")
    assert sound == ["00000"]
    assert digest(images, sound) == before
    assert (bad.file, str(bad)) == (Location(cut), str(refused.value))
    travelled = pickle.loads(pickle.dumps(bad))
    assert (travelled.file, travelled.fault, str(travelled)) == (bad.file, bad.fault, str(bad))
    (images / "00000.parquet").write_bytes(cut.read_bytes())
    with pytest.raises(BadFile, match="readable Parquet"):
        sound_shards(images, CONFIG, "quarantine")


def test_what_is_no_output_of_img2dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it has none"):
        shard_names(tmp_path)
    (tmp_path / "00000.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(ValueError, match="readable Parquet"):
        import_shard(tmp_path, "00000", CONFIG)
    (tmp_path / "bad name!.tar").touch()
    with pytest.raises(ValueError, match="not img2dataset's"):
        shard_names(tmp_path)


def test_a_failure_to_resize_is_said_so() -> None:
    assert drop_reason({"status": "failed_to_resize", "error_message": None}) == "resize_failed"
