"""The sampler: seeds stand alone, pictures are completed, what is wrong is refused."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.sampling.diagnosis import NonFiniteLogits
from pipelines.sampling.drawing import ALL_CODES, LARGEST_SEED, SamplingConfig
from pipelines.sampling.engine import Sampler, Start
from pipelines.sampling.image_tokens import sample_image_tokens
from pipelines.sampling.packing import PackedPrior
from pipelines.training.weights import load_stage_one
from tests.fixtures.models import SMALL, TINY, TinyModels, prompts, random_prior, tiny_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return tiny_models(tmp_path_factory.mktemp("models"), rows=8)


def test_a_seed_gives_the_same_tokens_in_any_batch() -> None:
    prior = random_prior(SMALL)
    text = prompts(3)
    seeds = list(range(40, 46))
    packed = PackedPrior(prior)
    together = sample_image_tokens(
        packed, text, candidates=2, seeds=seeds, sampling=SamplingConfig()
    )
    for index, seed in enumerate(seeds):
        alone = sample_image_tokens(
            packed,
            text[index // 2][None],
            candidates=1,
            seeds=[seed],
            sampling=SamplingConfig(),
        )
        assert torch.equal(alone[0], together[index])
    assert len({tuple(row.tolist()) for row in together}) == 6


def test_progress_tells_the_tokens_so_far_and_can_end_the_sampling() -> None:
    prior = random_prior(SMALL)
    seen: list[list[int]] = []

    def look(done: int, tokens: Tensor) -> None:
        seen.append(tokens[0, :done].tolist())
        if done == 10:
            raise TimeoutError("enough")

    text, config = prompts(1), SamplingConfig()
    whole = sample_image_tokens(PackedPrior(prior), text, candidates=1, seeds=[1], sampling=config)
    with pytest.raises(TimeoutError, match="enough"):
        sample_image_tokens(
            PackedPrior(prior), text, candidates=1, seeds=[1], sampling=config, on_progress=look
        )
    assert seen == [whole[0, :done].tolist() for done in range(1, 11)]


@pytest.mark.parametrize("cond_scale", [1.0, 2.0])
def test_primed_rows_stay_and_the_rest_is_what_their_tokens_would_have_led_to(
    cond_scale: float,
) -> None:
    """A picture that is cut off and completed with its own seed is the same picture."""
    packed, text = PackedPrior(random_prior(SMALL)), prompts(2)
    given: dict[str, Any] = {"candidates": 1, "seeds": [3, 4]}
    given["sampling"] = SamplingConfig(cond_scale=cond_scale)
    whole = sample_image_tokens(packed, text, **given)
    for kept in (6, 18, 36):
        again = sample_image_tokens(packed, text, primed=whole[:, :kept], **given)
        assert torch.equal(again, whole)
    other = (whole[:, :18] + 1) % 16
    changed = sample_image_tokens(packed, text, primed=other, **given)
    assert torch.equal(changed[:, :18], other)
    assert not torch.equal(changed[:, 18:], whole[:, 18:])


def test_a_picture_s_upper_rows_are_its_dvae_s_tokens(models: TinyModels) -> None:
    sampler = models.sampler()
    picture = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    tokens = sampler.first_rows(picture, 3)
    dvae, _ = load_stage_one(models.dvae)
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    assert np.array_equal(tokens, dvae.encode(pixels)[0, :3].flatten())
    (samples,) = sampler.sample(["dog"], n=3, seed=0, start=Start(tokens=tokens))
    assert all(np.array_equal(sample.tokens[:24], tokens) for sample in samples)
    assert len({tuple(sample.tokens) for sample in samples}) == 3


@pytest.mark.parametrize(
    ("picture", "rows", "message"),
    [
        (np.zeros((64, 64, 3), np.uint8), 9, "primed rows must be 1 to the grid's 8, got 9"),
        (np.zeros((64, 64, 3), np.uint8), 0, "primed rows must be 1 to the grid's 8, got 0"),
        (np.zeros((64, 32, 3), np.uint8), 1, "must be 64×64 pixels"),
        (np.zeros((64, 64, 4), np.uint8), 1, "must be 64×64 pixels"),
        (np.zeros((64, 64, 3), np.float32), 1, "must be 64×64 pixels, uint8 RGB, got float32"),
    ],
)
def test_a_picture_that_cannot_be_continued_is_refused(
    models: TinyModels, picture: np.ndarray, rows: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        models.sampler().first_rows(picture, rows)


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("text_position", (2, 0), math.nan, r"token 0 of 36 .* the embeddings at text slot 2"),
        # The input at 6 gives the logits at 7.
        ("row_position", (1, 0), math.inf, r"token 7 of 36 .* the embeddings at image token 6"),
        (
            "resblocks.2.attn.c_proj.bias",
            (1,),
            math.nan,
            r"token 0 of 36 .* the column attention of layer 2 at text slot 0",
        ),
        ("resblocks.5.c_fc.bias", (1,), math.inf, r"token 0 .* the MLP of layer 3 at text slot 0"),
        ("image_head.bias", (1,), -math.inf, r"token 0 of 36 .* the head at text slot 0"),
    ],
)
@pytest.mark.parametrize("cond_scale", [1.0, 1.5])
def test_logits_that_are_not_finite_are_an_error_that_names_layer_and_position(
    name: str, index: Any, value: float, message: str, cond_scale: float
) -> None:
    prior = random_prior(SMALL)
    with torch.no_grad():
        dict(prior.named_parameters())[name][index] = value
    config = SamplingConfig(cond_scale=cond_scale)
    with pytest.raises(NonFiniteLogits, match=message):
        sample_image_tokens(
            PackedPrior(prior), prompts(1), candidates=1, seeds=[0], sampling=config
        )


@pytest.mark.parametrize("top_k", [17, ALL_CODES + 1])
def test_top_k_must_be_a_number_of_codes_that_there_are(top_k: int) -> None:
    with pytest.raises(ValueError, match="top_k must be 1"):
        sample_image_tokens(
            PackedPrior(random_prior(SMALL)),
            prompts(1),
            candidates=1,
            seeds=[0],
            sampling=SamplingConfig(top_k=top_k),
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [0]}, "seeds must be one a candidate"),
        ({"seeds": [0, -1]}, "seed must be 0 to"),
        ({"seeds": [0, LARGEST_SEED + 1]}, "seed must be 0 to"),
        ({"candidates": 0, "seeds": []}, "a prompt and a candidate"),
        ({"text_tokens": torch.ones(1, 4, dtype=torch.int64)}, "text_tokens must be int64"),
        ({"text_tokens": torch.full((1, 5), 20)}, "text_tokens must be in"),
        ({"primed": torch.zeros(1, 6)}, "primed must be int64"),
        ({"primed": torch.zeros(2, 6, dtype=torch.int64)}, "primed must be int64"),
        ({"primed": torch.zeros(1, 37, dtype=torch.int64)}, "at most the grid's 36"),
        ({"primed": torch.full((1, 6), 16)}, r"primed must be in \[0, 16\)"),
        ({"primed": torch.full((1, 6), -1)}, r"primed must be in \[0, 16\)"),
    ],
)
def test_wrong_arguments_are_refused_in_words(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"text_tokens": prompts(1), "candidates": 2, "seeds": [0, 1]} | change
    packed = PackedPrior(random_prior(SMALL))
    with pytest.raises(ValueError, match=message):
        sample_image_tokens(packed, sampling=SamplingConfig(), **given)


def test_a_sampler_s_pictures_do_not_depend_on_how_many_are_made_at_once(
    models: TinyModels,
) -> None:
    sampler = models.sampler()  # eight at once
    many = sampler.sample(["red apple", "dog"], n=10, seed=7)
    assert [len(samples) for samples in many] == [10, 10]
    assert [sample.seed for sample in many[1]] == list(range(7, 17))
    one = sampler.sample(["dog"], n=1, seed=15)[0][0]
    assert np.array_equal(one.tokens, many[1][8].tokens)
    assert np.array_equal(one.pixels, many[1][8].pixels)
    assert one.pixels.shape == (64, 64, 3)
    assert one.pixels.dtype == np.uint8
    assert np.array_equal(sampler.generate("dog", n=2, seed=15)[0], one.pixels)


def test_a_prompt_may_fill_the_text_slots_but_not_more(models: TinyModels) -> None:
    sampler = models.sampler()
    assert sampler.prompt_limit == TINY.text_len - 1
    words = next(n for n in range(1, 40) if sampler.tokenizer.count("q " * n) > 15)
    assert sampler.check_prompt("q " * (words - 1)) <= 15
    with pytest.raises(ValueError, match="at most 15 tokens"):
        sampler.check_prompt("q " * words)
    sampler.generate("q " * 40)  # as a caption of the training set, cut off


@pytest.mark.parametrize("prompt", ["", "  \n", "a\0b", "\ud800"])
def test_a_prompt_that_is_no_text_is_refused(models: TinyModels, prompt: str) -> None:
    with pytest.raises(ValueError, match=r"prompt must|Unicode"):
        models.sampler().check_prompt(prompt)


def test_models_that_do_not_belong_together_are_refused(models: TinyModels) -> None:
    sampler = models.sampler()
    dvae, _ = load_stage_one(models.dvae)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"grid": 4}, "grid must be the dVAE's, got 4 and 8"),
        ({"image_vocab_size": 64}, "image vocabulary must be the dVAE's, got 64 and 128"),
        ({"text_vocab_size": 100}, "text vocabulary must hold"),
    ]
    for change, message in changes:
        other = random_prior(dataclasses.replace(TINY, **change))
        with pytest.raises(ValueError, match=message):
            Sampler(other, dvae, sampler.tokenizer)


def test_a_sampler_s_files_can_be_read_from_anywhere(models: TinyModels, tmp_path: Path) -> None:
    copy = tmp_path / "prior.safetensors"
    copy.write_bytes(models.prior.read_bytes())
    here = dataclasses.replace(models, prior=copy).sampler()
    assert np.array_equal(here.generate("dog")[0], models.sampler().generate("dog")[0])
