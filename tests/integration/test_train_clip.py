"""jobs.train_clip, end to end on a real Ray."""

import json
from pathlib import Path

import pytest
import torch

from jobs import train_clip
from pipelines.data.storage import sha256_file
from pipelines.data.tokenizer import CaptionTokenizer
from pipelines.sampling.reranking import load_reranker
from pipelines.training.clip_files import CLIP_FILE, load_clip
from tests.fixtures.datasets import TinyTokens, tiny_tokens

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TinyTokens:
    return tiny_tokens(tmp_path_factory.mktemp("pairs"), rows=48)


def arguments(made: TinyTokens, output: Path, *more: str) -> list[str]:
    return [
        "tiny",
        f"--filtered={made.tokens.parent / 'filtered'}",
        f"--tokenizer={made.tokenizer}",
        f"--dvae={made.dvae}",
        f"--output={output}",
        "--training.steps=4",
        "--training.batch-samples=8",
        "--cadence.log-every=2",
        "--cadence.checkpoint-every=2",
        *more,
    ]


def test_a_reranker_is_trained_kept_with_its_record_and_not_trained_again(
    made: TinyTokens, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = arguments(made, tmp_path / "clip", "--loaders.per-worker=1")
    assert train_clip.main(line) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    file = tmp_path / "clip" / CLIP_FILE
    assert summary["sha256"] == sha256_file(file)
    assert summary["steps"] == 4
    model, metadata = load_clip(file)
    assert metadata["tokenizer_sha256"] == CaptionTokenizer.from_file(made.tokenizer).digest
    assert len(metadata["filtered_digest"]) == 64
    assert metadata["dvae_sha256"] == sha256_file(made.dvae)
    assert model.config.image_size == 64
    reranker = load_reranker(file, made.tokenizer, torch.device("cpu"))
    pixels = torch.randint(256, (3, 64, 64, 3), dtype=torch.uint8).numpy()
    assert reranker.scores("a picture of a cat", pixels).shape == (3,)
    check_record(tmp_path / "clip", summary)
    assert train_clip.main(line) == 0
    assert "nothing to do" in capsys.readouterr().out


def check_record(output: Path, summary: dict[str, float]) -> None:
    """What metrics.jsonl and MLflow hold: the loss, and retrieval on what there is to judge."""
    from mlflow import MlflowClient

    rows = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    assert "less than two validation pairs" in rows[0]["notice"]
    assert [row["step"] for row in rows if "loss" in row] == [2, 4]
    (judged,) = [row for row in rows if "train_image_to_text_at_1" in row]
    assert judged["train_retrieval_pairs"] == 48
    assert summary["train_text_to_image_at_1"] == round(judged["train_text_to_image_at_1"], 5)
    run = json.loads((output / ".mlflow_run.json").read_text())
    client = MlflowClient(tracking_uri=run["uri"])
    for name in ("loss", "batch_accuracy", "train_image_to_text_at_1"):
        assert client.get_metric_history(run["run_id"], name)[-1].step == 4


def test_a_vocabulary_that_is_too_small_is_said_before_anything_starts(
    made: TinyTokens, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_clip.main(arguments(made, tmp_path / "clip", "--clip.vocab-size=100")) == 2
    assert "clip.vocab_size must be at least the tokenizer's" in capsys.readouterr().err
    assert not (tmp_path / "clip").exists()


def test_a_dvae_of_another_size_cannot_redraw(
    made: TinyTokens, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_clip.main(arguments(made, tmp_path / "clip", "--clip.image-size=32")) == 2
    assert "clip.image_size must be 64" in capsys.readouterr().err
    assert not (tmp_path / "clip").exists()
