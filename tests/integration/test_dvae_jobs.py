"""jobs.train_dvae and jobs.encode_pairs, end to end on a real Ray."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs import encode_pairs, train_dvae
from pipelines.data.crops import decode_picture
from pipelines.data.schema import FILTERED
from pipelines.data.stage import Manifest
from pipelines.data.storage import replace_file, sha256_file
from pipelines.data.tokenizer import CaptionTokenizer, TokenizerConfig, train_tokenizer
from pipelines.training.weights import load_stage_one
from tests.fixtures.datasets import CORPUS, filtered_pairs, filtered_row, tiny_dvae, write_dataset

pytestmark = pytest.mark.usefixtures("ray_cluster")
STEPS = 4


def train_arguments(filtered: Path, output: Path) -> list[str]:
    return [
        "tiny",
        f"--filtered={filtered}",
        f"--output={output}",
        f"--training.steps={STEPS}",
        "--cadence.log-every=2",
        "--cadence.checkpoint-every=2",
        "--dvae.n-hid=8",
    ]


def encode_arguments(path: Path, *more: str) -> list[str]:
    return [
        "tiny",
        f"--filtered={path / 'filtered'}",
        f"--dvae={path / 'dvae.safetensors'}",
        f"--tokenizer={path / 'tokenizer.json'}",
        f"--output={path / 'tokens'}",
        *more,
    ]


def summary(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    line: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return line


def test_a_trained_dvae_is_kept_with_its_record_and_not_trained_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = filtered_pairs(tmp_path / "filtered", rows=48)
    arguments = train_arguments(manifest.path, tmp_path / "dvae")
    assert train_dvae.main(arguments) == 0
    first = summary(capsys)
    model_file = tmp_path / "dvae/dvae.safetensors"
    assert first["sha256"] == sha256_file(model_file)
    assert first["steps"] == STEPS
    model, metadata = load_stage_one(model_file)
    assert metadata["filtered_digest"] == manifest.digest
    assert model.encode(torch.rand(1, 3, 64, 64)).shape == (1, 8, 8)
    rows = [json.loads(line) for line in (tmp_path / "dvae/metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [2, 4]
    assert {"relaxed_elb", "hard_elb", "gap", "perplexity"} <= set(rows[-1])
    assert train_dvae.main(arguments) == 0
    out = capsys.readouterr().out
    assert "nothing to do" in out
    assert json.loads(out.splitlines()[-1])["sha256"] == first["sha256"]
    assert train_dvae.main([*arguments, "--training.seed=1"]) == 2


def encode_inputs(path: Path, *, unusable: int = 0) -> Manifest:
    """40 pictures, the first ones not usable, in two shards; a tokenizer and an untrained dVAE."""
    corpus = pq.read_table(CORPUS, columns=["caption", "image"]).slice(0, 40).to_pylist()
    rows = [
        filtered_row(
            row["caption"], b"no picture %d" % number if number < unusable else row["image"]
        )
        for number, row in enumerate(corpus)
    ]
    tiny_dvae(path / "dvae.safetensors", image_size=64, vocab_size=128)
    captions = [row["caption"] for row in corpus]
    replace_file(
        path / "tokenizer.json", train_tokenizer(captions, TokenizerConfig(vocab_size=512))
    )
    table = pa.Table.from_pylist(rows, schema=FILTERED)
    return write_dataset(path / "filtered", "filter_pairs", table, inputs={"raw": "0" * 64})


def test_every_crop_is_encoded_or_dropped_for_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filtered = encode_inputs(tmp_path, unusable=3)
    arguments = encode_arguments(tmp_path, "--encoding.crops-per-picture=2")
    assert encode_pairs.main(arguments) == 0
    assert summary(capsys)["dropped"] == {"broken_picture": 6}
    tokens = Manifest.load(tmp_path / "tokens", stage="encode_pairs")
    assert (tokens.rows_in, tokens.rows_out) == (80, 74)
    assert tokens.inputs == {
        "filtered": filtered.digest,
        "dvae": sha256_file(tmp_path / "dvae.safetensors"),
        "tokenizer": CaptionTokenizer.from_file(tmp_path / "tokenizer.json").digest,
    }
    metadata = tokens.read("00000").schema.metadata
    assert metadata[b"manray.grid"] == b"8"
    assert metadata[b"manray.dvae_sha256"].decode() == tokens.inputs["dvae"]


def test_stored_tokens_are_the_codes_of_the_picture_that_is_named(tmp_path: Path) -> None:
    filtered = encode_inputs(tmp_path)
    assert encode_pairs.main(encode_arguments(tmp_path)) == 0
    tokens = Manifest.load(tmp_path / "tokens", stage="encode_pairs")
    model, _ = load_stage_one(tmp_path / "dvae.safetensors")
    for shard in ("00000", "00001"):
        pairs, rows = filtered.read(shard), tokens.read(shard).to_pylist()
        for pair, row in zip(pairs.to_pylist(), rows, strict=True):
            assert (row["key"], row["caption"]) == (pair["key"], pair["caption"])
            assert (row["crop_size"], row["crop_left"], row["crop_top"]) == (128, 0, 0)
            codes = torch.frombuffer(bytearray(row["image_tokens"]), dtype=torch.uint16)
            pixels = torch.from_numpy(decode_picture(pair["image"]).copy()).permute(2, 0, 1)[None]
            halved = torch.nn.functional.avg_pool2d(pixels.float(), 2).round() / 255
            same = codes.long() == model.encode(halved).flatten()
            assert same.float().mean() > 0.9  # halves are rounded otherwise than by OpenCV


def test_encoding_again_is_a_no_op_and_other_inputs_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode_inputs(tmp_path)
    assert encode_pairs.main(encode_arguments(tmp_path)) == 0
    digest = summary(capsys)["manifest_digest"]
    assert encode_pairs.main(encode_arguments(tmp_path)) == 0
    assert summary(capsys)["manifest_digest"] == digest
    tiny_dvae(tmp_path / "dvae.safetensors", image_size=64, vocab_size=64)
    assert encode_pairs.main(encode_arguments(tmp_path)) == 2
    assert "other settings or inputs" in capsys.readouterr().err


def test_a_lost_shard_is_encoded_to_the_same_bytes(tmp_path: Path) -> None:
    encode_inputs(tmp_path)
    assert encode_pairs.main(encode_arguments(tmp_path)) == 0
    before = Manifest.load(tmp_path / "tokens").digest
    for file in ("commits/00001.json", "manifest.json"):
        (tmp_path / "tokens" / file).unlink()
    assert encode_pairs.main(encode_arguments(tmp_path)) == 0
    assert Manifest.load(tmp_path / "tokens").digest == before


def test_a_missing_model_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode_inputs(tmp_path)
    (tmp_path / "dvae.safetensors").unlink()
    assert encode_pairs.main(encode_arguments(tmp_path)) == 2
    assert "dvae.safetensors must be a dvae model file" in capsys.readouterr().err
    assert not (tmp_path / "tokens/plan.json").exists()
