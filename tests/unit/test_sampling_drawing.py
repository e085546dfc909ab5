"""Draws follow the distribution that the settings make of the prior's, by their seed alone."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models.prior import Prior
from pipelines.sampling.drawing import SamplingConfig, draw, nucleus, uniform_draws
from pipelines.sampling.image_tokens import null_prompt, sample_image_tokens
from pipelines.sampling.packing import PackedPrior
from tests.fixtures.models import SMALL, prompts, random_prior

# So small that all its pictures can be counted.
WEE = dataclasses.replace(SMALL, n_layers=2, grid=2, image_vocab_size=3)


def kept(probabilities: list[float], config: SamplingConfig) -> list[float]:
    """What top_k and then top_p leave of a distribution, one code after the other."""
    order = sorted(range(len(probabilities)), key=lambda code: -probabilities[code])
    order = order[: config.top_k]
    total = sum(probabilities[code] for code in order)
    left, so_far = [0.0] * len(probabilities), 0.0
    for code in order:
        if so_far >= config.top_p * total:
            break
        left[code] = probabilities[code]
        so_far += probabilities[code]
    return [p / so_far for p in left]


def chain_probabilities(prior: Prior, text: Tensor, config: SamplingConfig) -> dict[Any, float]:
    """The probability of every possible picture, by the full forward."""
    pictures = torch.tensor(list(itertools.product(range(3), repeat=4)))
    with torch.inference_mode():
        _, logits = prior.logits(text.expand(len(pictures), -1), pictures)
        null = null_prompt(prior.config, text).expand(len(pictures), -1)
        _, empty = prior.logits(null, pictures)
    logits = empty.double() + config.cond_scale * (logits.double() - empty.double())
    steps = (logits / config.temperature).softmax(dim=-1)
    wanted = {}
    for picture, rows in zip(pictures.tolist(), steps.tolist(), strict=True):
        p = math.prod(kept(row, config)[code] for row, code in zip(rows, picture, strict=True))
        if p > 0:
            wanted[tuple(picture)] = p
    return wanted


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(),
        SamplingConfig(temperature=0.6),
        SamplingConfig(temperature=2.0),
        SamplingConfig(top_k=2),
        SamplingConfig(top_k=2, temperature=1.5),
        SamplingConfig(top_p=0.7),
        SamplingConfig(top_p=0.9, temperature=0.7),
        SamplingConfig(top_p=0.6, top_k=2),
        SamplingConfig(cond_scale=2.5),
        SamplingConfig(cond_scale=0.0),
    ],
)
def test_what_is_drawn_follows_the_model_s_distribution(config: SamplingConfig) -> None:
    """Chi-square over all 81 pictures of a 2×2 grid with 3 codes."""
    prior = random_prior(WEE)
    text = prompts(1, WEE)
    count = 20_000
    tokens = sample_image_tokens(
        PackedPrior(prior), text, candidates=count, seeds=range(count), sampling=config
    )
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
    text = prompts(2, SMALL)
    sharp = SamplingConfig(temperature=1e-6)
    cold = sample_image_tokens(
        PackedPrior(prior), text, candidates=2, seeds=range(4), sampling=sharp
    )
    top_1 = SamplingConfig(top_k=1)
    single = sample_image_tokens(
        PackedPrior(prior), text, candidates=2, seeds=range(4, 8), sampling=top_1
    )
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


@pytest.mark.parametrize(
    ("top_p", "left"),
    [(1e-9, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.9375, 3), (0.94, 4)],
)
def test_top_p_keeps_the_fewest_likely_codes_that_sum_to_it(top_p: float, left: int) -> None:
    probabilities = torch.tensor([[0.1875, 0.5, 0.0625, 0.25]], dtype=torch.float64)
    made = nucleus(probabilities, top_p)
    assert int((made > 0).sum()) == left
    assert torch.equal(made[made > 0], probabilities[made > 0])
    assert float(made.max()) == 0.5


def test_top_p_keeps_codes_that_are_equally_likely_together() -> None:
    even = torch.full((1, 8), 1 / 8, dtype=torch.float64)
    assert torch.equal(nucleus(even, 0.3), even)


def test_a_cond_scale_of_one_is_the_path_without_guidance_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And its cost: the same rows are embedded, the empty caption never."""
    prior, seen = random_prior(SMALL), []
    embed_text = Prior.embed_text

    def watch(self: Prior, text_tokens: Tensor) -> Tensor:
        seen.append(len(text_tokens))
        return embed_text(self, text_tokens)

    monkeypatch.setattr(Prior, "embed_text", watch)
    packed, text = PackedPrior(prior), prompts(2, SMALL)
    made = {
        scale: sample_image_tokens(
            packed,
            text,
            candidates=2,
            seeds=range(4),
            sampling=SamplingConfig() if scale is None else SamplingConfig(cond_scale=scale),
        )
        for scale in (None, 1.0, 3.0)
    }
    assert torch.equal(made[None], made[1.0])
    assert not torch.equal(made[1.0], made[3.0])
    assert seen == [2, 2, 4]


def test_a_cond_scale_of_zero_forgets_the_caption() -> None:
    packed, config = PackedPrior(random_prior(SMALL)), SamplingConfig(cond_scale=0.0)
    text = prompts(2, SMALL)
    made = sample_image_tokens(packed, text, candidates=1, seeds=[7, 7], sampling=config)
    assert torch.equal(made[0], made[1])
    null = null_prompt(SMALL, text)[:1]
    plain = SamplingConfig()
    alone = sample_image_tokens(packed, null, candidates=1, seeds=[7], sampling=plain)
    assert torch.equal(alone[0], made[0])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        *(({"temperature": x}, "temperature must be positive") for x in (0.0, -1.0, math.nan)),
        ({"temperature": math.inf}, "temperature must be positive"),
        *(({"top_k": x}, "top_k must be 1") for x in (0, -1)),
        *(({"top_p": x}, r"top_p must be in \(0, 1\]") for x in (0.0, -0.1, 1.01, math.nan)),
        *(({"cond_scale": x}, "cond_scale must be 0 or more") for x in (-0.1, math.nan, math.inf)),
        ({"precision": "fp16"}, "precision must be one of"),
    ],
)
def test_settings_that_mean_nothing_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**setting)
