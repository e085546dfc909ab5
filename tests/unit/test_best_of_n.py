"""The best of N by the reranker's score, and what judges find in it."""

import dataclasses
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from pipelines.data.stage import Manifest
from pipelines.evaluation.best_of_n import (
    RERANKER,
    THUMBNAILS,
    BestOfNConfig,
    Curve,
    best_of_groups,
    best_of_n,
)
from pipelines.evaluation.best_of_n_chart import best_of_n_chart
from pipelines.evaluation.corpus import read_corpus
from pipelines.sampling.reranking import load_reranker
from tests.fixtures.models import tiny_clip, tiny_models


def test_the_best_of_each_group_is_asked_for() -> None:
    scores = np.array([[0.1, 0.9, 0.3, 0.2], [0.5, 0.4, 0.0, 0.6]], np.float32)
    hits = np.array([[True, False, True, False], [False, True, True, True]])
    assert best_of_groups(scores, hits, 1).tolist() == [0.5, 0.75]
    assert best_of_groups(scores, hits, 2).tolist() == [0.5, 0.5]
    assert best_of_groups(scores, hits, 4).tolist() == [0.0, 1.0]


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory) -> Curve:
    path = tmp_path_factory.mktemp("models")
    models = tiny_models(path, rows=24)
    clips = [
        load_reranker(
            tiny_clip(path / f"{seed}.safetensors", models.tokenizer, seed=seed),
            models.tokenizer,
            torch.device("cpu"),
        )
        for seed in (0, 1)
    ]
    corpus = read_corpus(
        Manifest.load(models.tokens), Manifest.load(models.filtered), image_size=64, most=24
    )
    counted: list[int] = []
    made = best_of_n(
        models.sampler(),
        clips[0],
        corpus,
        BestOfNConfig(prompts=6, pools=(1, 2, 4), grid_rows=2),
        judge=clips[1],
        on_pictures=counted.append,
    )
    assert counted == [4] * made.prompts
    return made


def test_a_curve_has_every_judge_and_never_more_than_is_possible(curve: Curve) -> None:
    assert list(curve.share) == [THUMBNAILS, "judge", RERANKER]
    assert (curve.prompts, curve.corpus_pictures) == (6, 24)
    for judge, shares in curve.share.items():
        assert curve.possible[judge][0] == shares[0]  # of one candidate, nothing is chosen
        for share, possible in zip(shares, curve.possible[judge], strict=True):
            assert 0 <= share <= possible <= 1
        assert curve.possible[judge] == sorted(curve.possible[judge])
    assert set(curve.figures()) >= {"thumbnails_retrieval_at_1_best_of_4"}
    assert curve.grid.shape[0] > 2 * 96


def test_the_chart_is_a_whole_picture_that_needs_nothing_else(curve: Curve) -> None:
    svg = best_of_n_chart(curve)
    root = ElementTree.fromstring(svg)
    names = {element.tag.partition("}")[2] for element in root.iter()}
    assert names == {"svg", "rect", "text", "line", "circle", "polyline"}
    words = " ".join(element.text or "" for element in root.iter())
    assert "6 prompts" in words
    assert "N = 4" in words
    assert svg.count("<polyline") == 3
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")
    sides = [
        float(value)
        for element in root.iter("{*}circle")
        for value in element.attrib.values()
        if value[0] != "#"
    ]
    assert all(0 <= side <= 640 for side in sides)


def test_a_curve_without_a_second_judge_and_of_ones_can_be_drawn(curve: Curve) -> None:
    ones = {THUMBNAILS: [1.0, 1.0, 1.0]}
    zeros = {THUMBNAILS: [0.0, 0.0, 0.0]}
    flat = dataclasses.replace(curve, share=ones, half_width=zeros, possible=ones)
    ElementTree.fromstring(best_of_n_chart(flat))
    one = dataclasses.replace(
        curve, pools=(1,), share={THUMBNAILS: [0.0]}, half_width={THUMBNAILS: [0.0]}
    )
    ElementTree.fromstring(best_of_n_chart(one))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"pools": ()}, "pools must rise"),
        ({"pools": (8, 1)}, "pools must rise"),
        ({"pools": (0, 1)}, "pools must rise"),
        ({"pools": (1, 3, 8)}, "must be a multiple"),
        ({"prompts": 0}, "prompts must be"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        BestOfNConfig(**wrong)


def test_the_defaults_are_the_papers() -> None:
    assert BestOfNConfig().pools == (1, 8, 64, 512)


def test_the_path_of_a_reranker_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is none"):
        load_reranker(tmp_path / "none.safetensors", tmp_path, torch.device("cpu"))
