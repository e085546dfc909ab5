"""`jobs.import_clip` end to end on a small checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from jobs import import_clip
from pipelines.data.storage import sha256_file
from pipelines.sampling.reranking import load_reranker
from tests.fixtures.open_clip import HEADS, MERGES, weights


@pytest.fixture
def line(tmp_path: Path) -> list[str]:
    checkpoint, merges = tmp_path / "model.safetensors", tmp_path / "merges.txt"
    save_file(weights(), checkpoint)
    merges.write_bytes(MERGES)
    return [
        *("open_clip", "--checkpoint", str(checkpoint), "--merges", str(merges)),
        *("--image-heads", str(HEADS), "--output", str(tmp_path / "out")),
    ]


def test_an_imported_reranker_brings_its_own_vocabulary(
    line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert import_clip.main(line) == 0
    file = tmp_path / "out" / "clip.safetensors"
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["sha256"] == sha256_file(file)
    reranker = load_reranker(file, tmp_path / "no tokenizer", torch.device("cpu"))
    pictures = np.random.default_rng(0).integers(256, size=(3, 64, 64, 3), dtype=np.uint8)
    assert np.ptp(reranker.scores("the cat", pictures)) > 0
    assert import_clip.main(line) == 0
    assert "nothing to do" in capsys.readouterr().out
    (tmp_path / "out" / "bpe_merges.txt.gz").write_bytes(MERGES + b"a b\n")
    with pytest.raises(ValueError, match="import the model again"):
        load_reranker(file, tmp_path / "no tokenizer", torch.device("cpu"))


def test_a_vocabulary_of_another_model_is_refused_before_anything_is_written(
    line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "merges.txt").write_bytes(b"#version: 0.2\nt h\n")
    assert import_clip.main(line) == 2
    assert "must hold 5 merges" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
