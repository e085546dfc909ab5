"""Exports are read by the packages that others use, and have the same bytes every time."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jobs import export_webdataset
from pipelines.data.stage import Manifest
from pipelines.data.storage import Location
from pipelines.training.token_loader import read_tokens
from tests.fixtures.datasets import TinyTokens, filtered_pairs, tiny_tokens


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyTokens:
    return tiny_tokens(tmp_path_factory.mktemp("tiny"))


def export(dataset: Path | Location, output: Path) -> int:
    return export_webdataset.main(["tiny", "--dataset", str(dataset), "--output", str(output)])


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob("*.tar")}


def test_webdataset_reads_pictures_captions_and_json(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    manifest = filtered_pairs(tmp_path / "filtered", rows=40)
    assert export(manifest.path, tmp_path / "out") == 0
    rows = [row for table in manifest.tables() for row in table.to_pylist()]
    tars = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    assert len(tars) == 2
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil"))
    assert len(samples) == len(rows)
    for sample, row in zip(samples, rows, strict=True):
        assert sample["txt"] == row["caption"]
        assert sample["json"]["url"] == row["url"]
        assert sample["webp"].size == (128, 128)


def test_webdataset_reads_codes(tiny: TinyTokens, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    assert export(tiny.tokens, tmp_path / "out") == 0
    tars = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
    found = np.stack([sample["npy"] for sample in samples])
    keys, captions, tokens = read_tokens(Manifest.load(tiny.tokens))
    np.testing.assert_array_equal(found.reshape(len(keys), -1), tokens)
    assert [sample["txt"] for sample in samples] == captions
    assert [sample["json"]["key"] for sample in samples] == keys


def test_a_resumed_export_has_the_bytes_of_an_undisturbed_one(
    tiny: TinyTokens, tmp_path: Path
) -> None:
    assert export(tiny.tokens, tmp_path / "a") == 0
    assert export(tiny.tokens, tmp_path / "b") == 0
    whole = digests(tmp_path / "a")
    assert digests(tmp_path / "b") == whole
    index = (tmp_path / "b/index.json").read_bytes()
    (tmp_path / "b/index.json").unlink()
    (tmp_path / "b/00001.tar").unlink()
    (tmp_path / "b/.00001.tar.1234.tmp").write_bytes(b"half of it")  # as a kill leaves it
    assert export(tiny.tokens, tmp_path / "b") == 0
    assert digests(tmp_path / "b") == whole
    assert (tmp_path / "b/index.json").read_bytes() == index


def test_another_dataset_into_the_same_output_is_refused(tiny: TinyTokens, tmp_path: Path) -> None:
    assert export(tiny.tokens, tmp_path / "a") == 0
    assert export(tiny.tokens.parent / "filtered", tmp_path / "a") == 2


FILES = (
    "import json; folder = {folder!r}; files = [folder + '/' + shard['file'] "
    "for shard in json.load(open(folder + '/manifest.json'))['shards']]; "
)


def in_a_process(line: str, folder: Path, home: Path) -> list:
    done = subprocess.run(
        [sys.executable, "-c", FILES.format(folder=str(folder)) + line],
        env={"HOME": str(home), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_hugging_face_datasets_opens_token_shards(tiny: TinyTokens, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    line = (
        "import datasets; rows = datasets.load_dataset('parquet', data_files=files, "
        "split='train'); print(json.dumps([rows[0]['caption'], len(rows), "
        "list(rows[0]['image_tokens'])]))"
    )
    caption, count, tokens = in_a_process(line, tiny.tokens, tmp_path)
    _, captions, expected = read_tokens(Manifest.load(tiny.tokens))
    assert (caption, count) == (captions[0], len(captions))
    assert np.frombuffer(bytes(tokens), "<u2").tolist() == expected[0].tolist()


def test_duckdb_opens_token_shards(tiny: TinyTokens, tmp_path: Path) -> None:
    pytest.importorskip("duckdb")
    line = (
        "import duckdb; rows = duckdb.read_parquet(files).order('key').fetchall(); "
        "print(json.dumps([rows[0][1], len(rows), list(rows[0][2])]))"
    )
    caption, count, tokens = in_a_process(line, tiny.tokens, tmp_path)
    keys, captions, expected = read_tokens(Manifest.load(tiny.tokens))
    first = keys.index(min(keys))
    assert (caption, count) == (captions[first], len(captions))
    assert np.frombuffer(bytes(tokens), "<u2").tolist() == expected[first].tolist()
