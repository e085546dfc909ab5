"""jobs.encode_pairs end to end on a real Ray, undisturbed and disturbed."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from mlflow import MlflowClient
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from jobs import encode_pairs
from pipelines.data.decode import decode_picture
from pipelines.data.schema import FILTERED
from pipelines.data.stage import Manifest
from pipelines.data.storage import Location, replace_file, sha256_file
from pipelines.data.tokenizer import CaptionTokenizer, TokenizerConfig, train_tokenizer
from pipelines.training.weights import load_stage_one
from tests.fixtures.datasets import CORPUS, filtered_row, tiny_dvae, write_dataset
from tests.fixtures.processes import processes_named

pytestmark = pytest.mark.usefixtures("ray_cluster")
ROOT = Path(__file__).parents[2]
PICTURES = 40
SHARDS = 10
UNUSABLE = 3
CROPS = 2
BATCH = 16  # of the test of memory


def encode_arguments(path: Path, output: Path | Location, *more: str) -> list[str]:
    return [
        "tiny",
        f"--filtered={path / 'filtered'}",
        f"--dvae={path / 'dvae.safetensors'}",
        f"--tokenizer={path / 'tokenizer.json'}",
        f"--output={output}",
        f"--encoding.crops-per-picture={CROPS}",
        "--encoding.batch-samples=3",
        *more,
    ]


def summary_of(output: str) -> dict[str, Any]:
    line: dict[str, Any] = json.loads(output.splitlines()[-1])
    return line


def make_inputs(path: Path, *, pictures: int, image_size: int, rows_per_shard: int) -> None:
    """Pictures of the corpus, the first ones not usable, a tokenizer and an untrained dVAE."""
    corpus = pq.read_table(CORPUS, columns=["caption", "image"]).slice(0, pictures).to_pylist()
    rows = [
        filtered_row(
            row["caption"], b"no picture %d" % number if number < UNUSABLE else row["image"]
        )
        for number, row in enumerate(corpus)
    ]
    tiny_dvae(path / "dvae.safetensors", image_size=image_size, vocab_size=128)
    captions = [row["caption"] for row in corpus]
    tokenizer = train_tokenizer(captions, TokenizerConfig(vocab_size=512))
    replace_file(path / "tokenizer.json", tokenizer)
    write_dataset(
        path / "filtered",
        "filter_pairs",
        pa.Table.from_pylist(rows, schema=FILTERED),
        inputs={"raw": "0" * 64},
        rows_per_shard=rows_per_shard,
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inputs")
    make_inputs(path, pictures=PICTURES, image_size=64, rows_per_shard=PICTURES // SHARDS)
    return path


@pytest.fixture(scope="module")
def tokens(ray_cluster: None, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """What an undisturbed run makes."""
    output = tmp_path_factory.mktemp("undisturbed") / "tokens"
    assert encode_pairs.main(encode_arguments(inputs, output)) == 0
    return Manifest.load(output, stage="encode_pairs")


def test_every_crop_is_encoded_or_dropped_for_a_reason(inputs: Path, tokens: Manifest) -> None:
    assert tokens.dropped == {"not_a_picture": UNUSABLE * CROPS}
    assert tokens.rows_in == PICTURES * CROPS
    assert tokens.rows_out == (PICTURES - UNUSABLE) * CROPS
    assert tokens.inputs == {
        "filtered": Manifest.load(inputs / "filtered").digest,
        "dvae": sha256_file(inputs / "dvae.safetensors"),
        "tokenizer": CaptionTokenizer.from_file(inputs / "tokenizer.json").digest,
    }
    metadata = tokens.read("00000").schema.metadata
    assert metadata[b"manray.grid"] == b"8"
    assert metadata[b"manray.stage_one"] == b"dvae"
    assert metadata[b"manray.dvae_sha256"].decode() == tokens.inputs["dvae"]


def test_stored_tokens_are_the_codes_of_the_picture_that_is_named(
    inputs: Path, tokens: Manifest
) -> None:
    filtered = Manifest.load(inputs / "filtered")
    model, _ = load_stage_one(inputs / "dvae.safetensors")
    for shard in ("00000", "00009"):
        pairs = filtered.read(shard).to_pylist()[UNUSABLE if shard == "00000" else 0 :]
        pairs = [pair for pair in pairs for _ in range(CROPS)]
        for pair, row in zip(pairs, tokens.read(shard).to_pylist(), strict=True):
            assert (row["key"], row["caption"]) == (pair["key"], pair["caption"])
            assert (row["crop_size"], row["crop_left"], row["crop_top"]) == (128, 0, 0)
            codes = np.frombuffer(row["image_tokens"], "<u2")
            pixels = torch.from_numpy(decode_picture(pair["image"]).copy()).permute(2, 0, 1)[None]
            halved = torch.nn.functional.avg_pool2d(pixels.float(), 2).round() / 255
            same = codes == model.encode(halved).flatten().numpy()
            assert same.mean() > 0.9  # halves are rounded otherwise than by OpenCV


def test_encoding_again_is_a_no_op_and_other_inputs_are_refused(
    inputs: Path, tokens: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode_pairs.main(encode_arguments(inputs, tokens.path)) == 0
    summary = summary_of(capsys.readouterr().out)
    assert summary["manifest_digest"] == tokens.digest
    assert "images_per_second" not in summary
    tiny_dvae(tmp_path / "other.safetensors", image_size=64, vocab_size=64)
    other = encode_arguments(inputs, tokens.path, f"--dvae={tmp_path / 'other.safetensors'}")
    assert encode_pairs.main(other) == 2
    assert "other settings or inputs" in capsys.readouterr().err


def test_a_missing_model_is_refused_before_anything_is_written(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none = f"--dvae={tmp_path / 'none.safetensors'}"
    assert encode_pairs.main(encode_arguments(inputs, tmp_path / "tokens", none)) == 2
    assert "none.safetensors must be a dvae or vqvae model file" in capsys.readouterr().err
    assert not (tmp_path / "tokens").exists()


def test_more_actors_than_the_cluster_has_room_for_are_refused_in_words(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, words in (
        (["--encoders=5"], "it has 4 CPUs for 5 encoders and 1 decoders"),
        (["--device=gpu"], "it has places for 0"),
        (["--encoding.precision=fp16"], "must be fp32 or bf16 on CPUs"),
    ):
        output = tmp_path / flags[0].strip("-")
        assert encode_pairs.main(encode_arguments(inputs, output, *flags)) == 2
        assert words in capsys.readouterr().err
        assert not list(output.glob("commits/*"))


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tokens"
    assert encode_pairs.main(encode_arguments(inputs, output, "--dry-run")) == 0
    said = capsys.readouterr().out
    assert f"encode {PICTURES} pictures" in said
    assert f"{CROPS} crop(s) of each: {PICTURES * CROPS} rows" in said
    assert f"in {SHARDS} shards, of which {SHARDS} are missing" in said
    assert "1 decoder(s) and 1 encoder(s) on 1 GPU each, on CPUs if there are too few" in said
    assert f"{PICTURES * CROPS * 8 * 8 * 2:,} bytes of codes" in said
    assert not output.exists()


def test_lost_shards_are_encoded_to_the_same_bytes_by_other_numbers_of_actors(
    inputs: Path,
    tokens: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    output = tmp_path / "tokens"
    flags = ["--encoders=2", "--decoders=2", "--tracking.experiment=pairs"]
    assert encode_pairs.main(encode_arguments(inputs, output, *flags)) == 0
    summary = summary_of(capsys.readouterr().out)
    assert summary["manifest_digest"] == tokens.digest
    assert summary["images_per_second"] > 0
    assert 0 < summary["encoder_busy"] <= 1
    assert 0 < summary["seconds_to_first_block"] < summary["seconds"]
    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("pairs").experiment_id])
    for name in ("images_per_second", "encoder_busy", "seconds_to_first_block"):
        assert run.data.metrics[name] == summary[name]

    for file in ("commits/00001.json", "commits/00004.json", "manifest.json"):
        (output / file).unlink()
    assert encode_pairs.main(encode_arguments(inputs, output)) == 0
    assert summary_of(capsys.readouterr().out)["manifest_digest"] == tokens.digest


@pytest.mark.parametrize("role", ["ShardDecoder", "BlockEncoder"])
def test_a_killed_actor_loses_and_doubles_nothing(
    role: str, inputs: Path, tokens: Manifest, tmp_path: Path
) -> None:
    output = tmp_path / "tokens"
    killed: list[int] = []

    def kill_once() -> None:
        if not killed and any(output.glob("commits/*.json")):
            for pid in processes_named(role):
                os.kill(pid, signal.SIGKILL)
                killed.append(len(list(output.glob("commits/*.json"))))

    with repeating(kill_once):
        assert encode_pairs.main(encode_arguments(inputs, output)) == 0
    assert killed
    assert killed[0] < SHARDS
    assert Manifest.load(output).digest == tokens.digest


@pytest.mark.timeout(300)
def test_a_killed_driver_goes_on_to_the_same_digest(
    inputs: Path, tokens: Manifest, tmp_path: Path
) -> None:
    output = tmp_path / "tokens"
    driver = subprocess.Popen(
        [sys.executable, "-m", "jobs.encode_pairs", *encode_arguments(inputs, output)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    look_again = threading.Event()
    while not list(output.glob("commits/*.json")):
        assert driver.poll() is None, "the driver ended before it was killed"
        look_again.wait(0.02)
    driver.kill()
    driver.wait()
    assert not (output / "manifest.json").exists()
    assert encode_pairs.main(encode_arguments(inputs, output)) == 0
    assert Manifest.load(output).digest == tokens.digest


def test_memory_does_not_grow_with_the_dataset(tmp_path: Path) -> None:
    peaks = []
    for name, pictures in (("small", 48), ("large", 8 * 48)):
        path = tmp_path / name
        make_inputs(path, pictures=pictures, image_size=128, rows_per_shard=48)
        more = ["--encoding.crops-per-picture=4", f"--encoding.batch-samples={BATCH}"]
        peak = Peak()
        with repeating(peak.look):
            assert encode_pairs.main(encode_arguments(path, path / "tokens", *more)) == 0
        peaks.append(peak)
    small, large = peaks
    # The large one's 75 MB of squares would be 14 % of either.
    assert large.encoder_bytes < 1.1 * small.encoder_bytes
    assert large.decoder_bytes < 1.1 * small.decoder_bytes
    # Of 96 blocks, decoders may fill 8 (two each for the encoder and the decoder, twice), and have
    # some more under way.
    assert large.store_bytes < 24 * BATCH * 128 * 128 * 3


class Peak:
    """The most memory of the actors, and of the object store beyond what was there before."""

    def __init__(self) -> None:
        self.encoder_bytes = self.decoder_bytes = self.store_bytes = 0
        self.gcs = get_state_from_address(ray.get_runtime_context().gcs_address)
        self.before = self._store()

    def look(self) -> None:
        self.encoder_bytes = max([self.encoder_bytes, *peak_memory_of("BlockEncoder")])
        self.decoder_bytes = max([self.decoder_bytes, *peak_memory_of("ShardDecoder")])
        self.store_bytes = max(self.store_bytes, self._store() - self.before)

    def _store(self) -> int:
        used: int = get_memory_info_reply(self.gcs).store_stats.object_store_bytes_used
        return used


def peak_memory_of(role: str) -> list[int]:
    """The most bytes resident at once, shared ones too, of the role's processes so far."""
    peaks = []
    for pid in processes_named(role):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        peaks += [int(line.split()[1]) << 10 for line in status.splitlines() if "VmHWM" in line]
    return peaks


@contextmanager
def repeating(look: Callable[[], None]) -> Iterator[None]:
    """Call `look` every few milliseconds within it."""
    end = threading.Event()

    def watch() -> None:
        while not end.wait(0.005):
            look()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
