"""`jobs.evaluate` end to end on saved models and datasets."""

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from jobs import evaluate
from tests.fixtures.datasets import filtered_pairs
from tests.fixtures.models import TinyModels, tiny_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return tiny_models(tmp_path_factory.mktemp("models"), rows=40)


def line(models: TinyModels, output: Path, *more: str) -> list[str]:
    return [
        *("tiny", "--output", str(output), "--tokenizer", str(models.tokenizer)),
        *("--dvae", str(models.dvae), "--prior", str(models.prior)),
        *("--tokens", str(models.tokens), "--filtered", str(models.filtered)),
        *("--evaluation.prompts", "8", "--evaluation.grid-rows", "4", "--device", "cpu", *more),
    ]


def test_figures_and_a_grid_are_written_once(
    models: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert evaluate.main(line(models, output)) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    figures = json.loads((output / "evaluation.json").read_text())
    assert {
        "image_loss",
        "text_loss",
        "image_loss_shuffled_captions",
        "retrieval_at_1",
        "reconstruction_retrieval_at_1",
    } <= figures.keys()
    assert figures.items() <= summary.items()
    assert (figures["prompts"], figures["corpus_pictures"]) == (8, 40)
    grid = (output / "grid.png").read_bytes()
    assert Image.open(output / "grid.png").height > 4 * 96
    logged = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
    assert logged["image_loss"] == figures["image_loss"]

    assert evaluate.main(line(models, output)) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (output / "grid.png").read_bytes() == grid
    assert evaluate.main(line(models, output, "--evaluation.seed", "1")) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize("which", ["filtered", "tokenizer", "dvae"])
def test_inputs_that_do_not_belong_together_are_refused_with_both_digests(
    models: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str], which: str
) -> None:
    if which == "filtered":
        filtered_pairs(tmp_path / "filtered", rows=8)
        foreign = dataclasses.replace(models, filtered=tmp_path / "filtered")
    else:  # a token dataset that was made with another one than the prior was trained with
        other = tiny_models(tmp_path / "other", rows=24)
        foreign = dataclasses.replace(models, tokens=other.tokens, filtered=other.filtered)
        if which == "dvae":
            foreign = dataclasses.replace(
                foreign, tokenizer=other.tokenizer, prior=other.prior, dvae=tmp_path / "dvae"
            )
            data = bytearray(other.dvae.read_bytes())
            data[-1] ^= 1
            (tmp_path / "dvae").write_bytes(data)
    assert evaluate.main(line(foreign, tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert which in said
    assert not (tmp_path / "out").exists()


def test_a_directory_that_is_no_dataset_is_refused(
    models: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = dataclasses.replace(models, tokens=tmp_path)
    assert evaluate.main(line(foreign, tmp_path / "out")) == 2
    assert "finished dataset" in capsys.readouterr().err


def test_a_dry_run_names_the_work_and_writes_nothing(
    models: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(line(models, tmp_path / "out", "--dry-run")) == 0
    assert "on 40 of 40 pictures" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
