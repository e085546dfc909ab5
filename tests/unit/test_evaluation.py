"""Judging a prior: losses as in training, derangements, retrieval, and the corpus behind them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines.data.decode import decode_picture
from pipelines.data.stage import Manifest
from pipelines.evaluation import retrieval
from pipelines.evaluation.corpus import read_corpus, true_crop
from pipelines.evaluation.losses import shuffle_captions, token_losses
from pipelines.evaluation.protocol import EvaluationConfig, evaluate
from tests.fixtures.models import TinyModels, tiny_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return tiny_models(tmp_path_factory.mktemp("models"), rows=40)


def datasets(models: TinyModels) -> tuple[Manifest, Manifest]:
    return Manifest.load(models.tokens), Manifest.load(models.filtered)


def test_losses_are_the_training_s_in_batches_of_any_size(models: TinyModels) -> None:
    sampler = models.sampler()
    captions = ["dog", "a red apple and a long caption " * 3, "full moon", "x", "fire engine"]
    text = sampler.encode_prompts(captions)
    image = torch.randint(0, 128, (5, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = sampler.prior(text, image)
    for batch_samples in (1, 2, 5, 100):
        seen: list[int] = []
        losses = token_losses(
            sampler.prior, text, image, batch_samples=batch_samples, on_rows=seen.append
        )
        assert losses.text == pytest.approx(float(wanted.text), rel=1e-5)
        assert losses.image == pytest.approx(float(wanted.image), rel=1e-5)
        assert sum(seen) == 5


def test_shuffling_gives_every_row_another_caption() -> None:
    captions = ["a", "a", "b", "c", "a", "d"]
    shuffled = shuffle_captions(captions)
    assert all(new != old for new, old in zip(shuffled, captions, strict=True))
    assert shuffled == shuffle_captions(captions)
    letters = [chr(97 + index) for index in range(9)]
    assert sorted(shuffle_captions(letters)) == letters  # a derangement, where all differ
    with pytest.raises(ValueError, match="must differ"):
        shuffle_captions(["same", "same"])


def test_the_nearest_picture_is_the_one_that_looks_most_alike() -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    corpus = retrieval.thumbnails(pictures)
    assert corpus.shape == (20, 16 * 16 * 3)
    noisy = np.clip(pictures[[3, 11]].astype(int) + rng.integers(-20, 20, (2, 32, 32, 3)), 0, 255)
    found = retrieval.nearest(retrieval.thumbnails(noisy.astype(np.uint8)), corpus)
    assert found.tolist() == [3, 11]
    keys = [f"k{index}" for index in range(20)]
    queries = [pictures[3], pictures[4]]
    assert retrieval.share_of_hits(queries, [3, 5], corpus, keys) == 0.5
    keys[5] = keys[4]  # two crops of one picture
    assert retrieval.share_of_hits(queries, [3, 5], corpus, keys) == 1.0


def test_a_thumbnail_is_the_mean_colour_of_each_of_its_256_squares() -> None:
    picture = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    means = picture.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
    assert np.abs(retrieval.thumbnails([picture]).reshape(16, 16, 3) - means).max() <= 0.5


def test_prompts_are_captions_that_name_one_row() -> None:
    captions = ["dog", "cat", "dog", "moon"]
    chosen = retrieval.choose_prompts(captions, 32, seed=0)
    assert sorted(chosen) == [1, 3]
    assert chosen == retrieval.choose_prompts(captions, 32, seed=0)
    many = [str(number) for number in range(100)]
    assert len(set(retrieval.choose_prompts(many, 32, seed=0))) == 32
    assert retrieval.choose_prompts(many, 32, 0) != retrieval.choose_prompts(many, 32, 1)
    with pytest.raises(ValueError, match="more than once"):
        retrieval.choose_prompts(["dog", "dog"], 1, seed=0)


def test_the_corpus_holds_each_row_s_own_picture_and_tokens(models: TinyModels) -> None:
    tokens, filtered = datasets(models)
    corpus = read_corpus(tokens, filtered, image_size=64, most=1000)
    assert len(corpus) == 40
    rows = pa.concat_tables(tokens.tables()).to_pylist()
    images = {row["key"]: row["image"] for row in pa.concat_tables(filtered.tables()).to_pylist()}
    for index in (0, 31, 32, 39):  # of both shards
        assert corpus.keys[index] == rows[index]["key"]
        assert corpus.captions[index] == rows[index]["caption"]
        codes = np.frombuffer(rows[index]["image_tokens"], "<u2")
        assert np.array_equal(corpus.image_tokens[index], codes)
        original = decode_picture(images[corpus.keys[index]])
        means = original.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
        assert np.abs(corpus.pictures[index] - means).max() <= 0.5


def test_a_large_corpus_is_sampled_evenly_and_always_alike(models: TinyModels) -> None:
    tokens, filtered = datasets(models)
    whole = read_corpus(tokens, filtered, image_size=64, most=40)
    part = read_corpus(tokens, filtered, image_size=64, most=4)
    assert part.keys == [whole.keys[index] for index in (0, 13, 26, 39)]


def test_a_true_crop_is_the_square_that_was_encoded(models: TinyModels) -> None:
    _, filtered = datasets(models)
    image = filtered.read("00000")["image"][0].as_py()
    crop = true_crop(image, {"crop_size": 64, "crop_left": 10, "crop_top": 20}, 64)
    assert np.array_equal(crop, decode_picture(image)[20:84, 10:74])


def test_pictures_that_the_filtered_dataset_does_not_have_are_missed(
    models: TinyModels, tmp_path: Path
) -> None:
    tokens, _ = datasets(models)
    other = Manifest.load(tiny_models(tmp_path, rows=8).filtered)
    with pytest.raises(ValueError, match="must hold the pictures"):
        read_corpus(tokens, other, image_size=64, most=10)


def test_an_evaluation_counts_its_work_and_shows_its_pictures(models: TinyModels) -> None:
    corpus = read_corpus(*datasets(models), image_size=64, most=1000)
    config = EvaluationConfig(prompts=6, grid_rows=3, grid_samples=2)
    done: list[int] = []
    result = evaluate(models.sampler(), corpus, config, batch_samples=16, on_rows=done.append)
    assert sum(done) == config.work(40)
    figures = result.figures
    assert (figures["prompts"], figures["corpus_pictures"]) == (6, 40)
    assert 0 <= figures["retrieval_at_1"] <= 1
    # An untrained prior does not listen to captions.
    assert figures["image_loss"] == pytest.approx(figures["image_loss_shuffled_captions"], abs=0.2)
    assert result.grid.dtype == np.uint8
    again = evaluate(models.sampler(), corpus, config, batch_samples=16, on_rows=done.append)
    assert again.figures == figures
    assert np.array_equal(again.grid, result.grid)


def test_pictures_of_the_true_tokens_are_found_among_the_dvae_s_own(models: TinyModels) -> None:
    corpus = read_corpus(*datasets(models), image_size=64, most=1000)
    sampler = models.sampler()
    decoded = sampler.decode(torch.from_numpy(corpus.image_tokens))
    thumbnails = retrieval.thumbnails(decoded)
    rows = retrieval.choose_prompts(corpus.captions, 32, seed=0)
    pictures = [decoded[row] for row in rows]
    assert retrieval.share_of_hits(pictures, rows, thumbnails, corpus.keys) == 1.0
