"""The sampler: cached steps equal the full forward, seeds stand alone, draws follow the model."""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.attention import LayerKind, image_mask
from models.prior import PAD_ID, START_ID, AttentionResblock, Prior, PriorConfig
from pipelines.sampling.decoder import CachedDecoder, visible_positions
from pipelines.sampling.engine import (
    ALL_CODES,
    LARGEST_SEED,
    NonFiniteLogits,
    Sampler,
    SamplingConfig,
    draw,
    sample_image_tokens,
    uniform_draws,
)
from pipelines.training.weights import load_stage_one
from tests.fixtures.models import TINY, TinyModels, random_prior, tiny_models

SMALL = PriorConfig(
    n_layers=4,
    n_heads=2,
    d_model=32,
    text_len=5,
    text_vocab_size=20,
    grid=6,
    image_vocab_size=16,
    conv_kernel=3,
)
KINDS: list[LayerKind] = ["row", "column", "conv", "full"]
# So small that all its pictures can be counted.
WEE = dataclasses.replace(SMALL, n_layers=2, grid=2, image_vocab_size=3)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return tiny_models(tmp_path_factory.mktemp("models"), rows=8)


def prompts(count: int, config: PriorConfig = SMALL) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    text = torch.randint(2, config.text_vocab_size, (count, config.text_len), generator=generator)
    text[:, 0] = START_ID
    text[:, 3:] = PAD_ID
    return text


def decode_given(prior: Prior, text: Tensor, image: Tensor, candidates: int) -> Tensor:
    """Logits (B, grid², K) of given image tokens, step by step."""
    decoder = CachedDecoder(prior, candidates)
    logits = [decoder.prefill(text)]
    for position in range(image.shape[1] - 1):
        logits.append(decoder.step(image[:, position], position))
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("kind", [*KINDS, "sparse"])
def test_cached_steps_give_the_logits_of_the_full_forward(kind: Any) -> None:
    """Each layer kind on its own in every layer, and the paper's mixture."""
    prior = random_prior(SMALL)
    if kind != "sparse":
        only = dataclasses.replace(SMALL, attention="full")
        prior = random_prior(only)
        for resblock in prior.resblocks:
            if isinstance(resblock, AttentionResblock):
                resblock.kind = kind
        prior._masks["full", torch.device("cpu")] = prior.mask(kind, torch.device("cpu"))
    text = prompts(2)
    image = torch.randint(0, 16, (6, 36), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        _, wanted = prior.logits(text.repeat_interleave(3, dim=0), image)
        got = decode_given(prior, text, image, candidates=3)
    assert wanted.std() > 0.3  # else small differences would prove nothing
    assert float((got - wanted).abs().max()) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_visible_positions_are_the_mask_s(kind: LayerKind) -> None:
    mask = image_mask(kind, 5, 3)
    for query, seen in enumerate(visible_positions(kind, 5, 3, torch.device("cpu"))):
        assert torch.arange(25)[seen].tolist() == mask[query].nonzero().squeeze(1).tolist()


def test_a_seed_gives_the_same_tokens_in_any_batch() -> None:
    prior = random_prior(SMALL)
    text = prompts(3)
    seeds = list(range(40, 46))
    together = sample_image_tokens(
        prior, text, candidates=2, seeds=seeds, sampling=SamplingConfig()
    )
    for index, seed in enumerate(seeds):
        alone = sample_image_tokens(
            prior,
            text[index // 2][None],
            candidates=1,
            seeds=[seed],
            sampling=SamplingConfig(),
        )
        assert torch.equal(alone[0], together[index])
    assert len({tuple(row.tolist()) for row in together}) == 6


def chain_probabilities(prior: Prior, text: Tensor, config: SamplingConfig) -> dict[Any, float]:
    """The probability of every possible picture, by the full forward."""
    pictures = torch.tensor(list(itertools.product(range(3), repeat=4)))
    with torch.inference_mode():
        _, logits = prior.logits(text.expand(len(pictures), -1), pictures)
    logits = logits.double() / config.temperature
    if config.top_k < 3:
        least = logits.sort(dim=-1, descending=True).values[..., config.top_k - 1, None]
        logits = torch.where(logits < least, -math.inf, logits)
    picked = logits.log_softmax(dim=-1).gather(-1, pictures[..., None]).squeeze(-1).sum(-1).exp()
    return {tuple(row.tolist()): float(p) for row, p in zip(pictures, picked, strict=True) if p > 0}


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(),
        SamplingConfig(temperature=0.6),
        SamplingConfig(temperature=2.0),
        SamplingConfig(top_k=2),
        SamplingConfig(top_k=2, temperature=1.5),
    ],
)
def test_what_is_drawn_follows_the_model_s_distribution(config: SamplingConfig) -> None:
    """Chi-square over all 81 pictures of a 2×2 grid with 3 codes."""
    prior = random_prior(WEE)
    text = prompts(1, WEE)
    count = 20_000
    tokens = sample_image_tokens(prior, text, candidates=count, seeds=range(count), sampling=config)
    wanted = chain_probabilities(prior, text, config)
    assert sum(wanted.values()) == pytest.approx(1, abs=1e-6)
    found: dict[Any, int] = dict.fromkeys(wanted, 0)
    for row in tokens.tolist():
        found[tuple(row)] += 1  # a picture of probability 0 is a KeyError
    frequent = [picture for picture, p in wanted.items() if p * count >= 5]
    rest = count - sum(found[picture] for picture in frequent)
    rest_wanted = count * (1 - sum(wanted[picture] for picture in frequent))
    chi_square = sum(
        (found[picture] - count * wanted[picture]) ** 2 / (count * wanted[picture])
        for picture in frequent
    )
    cells = len(frequent)
    if rest_wanted >= 5:
        chi_square += (rest - rest_wanted) ** 2 / rest_wanted
        cells += 1
    # Five standard deviations above the mean of chi-square with that many degrees of freedom.
    assert chi_square < cells + 5 * math.sqrt(2 * cells)


def test_a_tiny_temperature_and_top_1_take_the_most_likely_code() -> None:
    prior = random_prior(SMALL)
    text = prompts(2)
    sharp = SamplingConfig(temperature=1e-6)
    cold = sample_image_tokens(prior, text, candidates=2, seeds=range(4), sampling=sharp)
    top_1 = SamplingConfig(top_k=1)
    single = sample_image_tokens(prior, text, candidates=2, seeds=range(4, 8), sampling=top_1)
    with torch.inference_mode():
        _, logits = prior.logits(text.repeat_interleave(2, dim=0), cold)
    assert torch.equal(cold, logits.argmax(-1))
    assert torch.equal(single, cold)


def test_a_draw_reaches_every_code_at_the_edges_of_the_distribution() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]])).expand(6, -1)
    uniform = torch.tensor([0.0, 0.4999, 0.5001, 0.7499, 0.7501, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniform, SamplingConfig()).tolist() == [0, 0, 1, 1, 2, 2]


def test_a_code_of_no_probability_is_never_drawn() -> None:
    logits = torch.tensor([[-1e9, 0.0, -1e9, 0.0, -1e9]]).expand(2, -1)
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, edges, SamplingConfig()).tolist() == [1, 3]
    assert draw(logits, edges, SamplingConfig(top_k=2)).tolist() == [1, 3]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e300])
def test_any_positive_temperature_is_a_temperature(temperature: float) -> None:
    uniform = torch.full((1,), 0.9, dtype=torch.float64)
    code = draw(torch.tensor([[3.0, -2.0, 1.0]]), uniform, SamplingConfig(temperature=temperature))
    assert code.tolist() == [2 if temperature > 1 else 0]


def test_draws_are_a_function_of_the_seed_alone() -> None:
    draws = uniform_draws([3, 4, 3], 50)
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0][:20], uniform_draws([3], 20)[0])


@pytest.mark.parametrize(("position", "value"), [(0, math.nan), (7, math.inf)])
def test_logits_that_are_not_finite_are_an_error_that_names_the_position(
    position: int, value: float
) -> None:
    prior = random_prior(SMALL)
    with torch.no_grad():
        if position == 0:
            prior.text_position[2, 0] = value
        else:  # the input at 6 gives the logits at 7
            prior.row_position[1, 0] = value
    with pytest.raises(NonFiniteLogits, match=f"image token {position} of 36"):
        sample_image_tokens(prior, prompts(1), candidates=1, seeds=[0], sampling=SamplingConfig())


def test_progress_tells_the_tokens_so_far_and_can_end_the_sampling() -> None:
    prior = random_prior(SMALL)
    seen: list[list[int]] = []

    def look(done: int, tokens: Tensor) -> None:
        seen.append(tokens[0, :done].tolist())
        if done == 10:
            raise TimeoutError("enough")

    text, config = prompts(1), SamplingConfig()
    whole = sample_image_tokens(prior, text, candidates=1, seeds=[1], sampling=config)
    with pytest.raises(TimeoutError, match="enough"):
        sample_image_tokens(prior, text, candidates=1, seeds=[1], sampling=config, on_progress=look)
    assert seen == [whole[0, :done].tolist() for done in range(1, 11)]


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_must_be_positive_and_finite(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        SamplingConfig(temperature=temperature)


@pytest.mark.parametrize("top_k", [0, -1, 17, ALL_CODES + 1])
def test_top_k_must_be_a_number_of_codes_that_there_are(top_k: int) -> None:
    with pytest.raises(ValueError, match="top_k must be 1"):
        sample_image_tokens(
            random_prior(SMALL),
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
    ],
)
def test_wrong_arguments_are_refused_in_words(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"text_tokens": prompts(1), "candidates": 2, "seeds": [0, 1]} | change
    with pytest.raises(ValueError, match=message):
        sample_image_tokens(random_prior(SMALL), sampling=SamplingConfig(), **given)


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
