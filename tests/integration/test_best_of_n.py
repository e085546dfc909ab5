"""`jobs.best_of_n` end to end on saved models and datasets."""

import json
from pathlib import Path

import pytest
from PIL import Image

from jobs import best_of_n
from tests.fixtures.models import TinyModels, tiny_clip, tiny_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return tiny_models(tmp_path_factory.mktemp("models"), rows=24)


def line(models: TinyModels, output: Path, clip: Path, *more: str) -> list[str]:
    return [
        *("tiny", "--output", str(output), "--tokenizer", str(models.tokenizer)),
        *("--dvae", str(models.dvae), "--prior", str(models.prior), "--clip", str(clip)),
        *("--tokens", str(models.tokens), "--filtered", str(models.filtered)),
        *("--best-of-n.prompts", "4", "--best-of-n.pools", "1", "2", "--device", "cpu", *more),
    ]


def test_a_curve_is_measured_once(
    models: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = tiny_clip(tmp_path / "clip.safetensors", models.tokenizer)
    judge = tiny_clip(tmp_path / "judge.safetensors", models.tokenizer, seed=1)
    output = tmp_path / "out"
    arguments = line(models, output, clip, "--judge", str(judge))
    assert best_of_n.main(arguments) == 0
    record = json.loads((output / "best-of-n.json").read_text())
    assert record["pools"] == [1, 2]
    assert set(record["retrieval_at_1"]) == {"thumbnails", "judge", "reranker"}
    assert record["prompts"] == 4
    assert set(record["digests"]) >= {"clip", "judge", "prior", "tokens"}
    assert Image.open(output / "best-of-n.png").height > 4 * 96
    assert (output / "best-of-n.svg").read_text().startswith("<svg")
    logged = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
    share = record["retrieval_at_1"]["thumbnails"]
    assert logged["thumbnails_retrieval_at_1_best_of_2"] == share[1]
    capsys.readouterr()
    assert best_of_n.main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert best_of_n.main([*arguments[:-1], str(clip)]) == 2
    assert "judge must be another model" in capsys.readouterr().err


def test_a_missing_reranker_is_said_before_anything_is_sampled(
    models: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert best_of_n.main(line(models, tmp_path / "out", tmp_path / "none")) == 2
    assert "run jobs.train_clip first" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
