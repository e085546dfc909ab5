"""Captions that the prior completes before it draws."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.prior import PAD_ID, START_ID, Prior
from pipelines.sampling.captions import complete_caption
from pipelines.sampling.diagnosis import NonFiniteLogits
from pipelines.sampling.drawing import SamplingConfig
from pipelines.sampling.engine import Start
from pipelines.sampling.packing import PackedPrior
from tests.fixtures.models import SMALL, random_prior, tiny_models

CAPTION = torch.tensor([[START_ID, 7, 13, PAD_ID, PAD_ID]])


def complete(
    prior: Prior, text: Tensor, seeds: range, vocab_size: int = 20, **setting: Any
) -> Tensor:
    config = SamplingConfig(**setting)
    return complete_caption(
        PackedPrior(prior), text, vocab_size=vocab_size, seeds=seeds, sampling=config
    )


def test_completed_captions_follow_the_text_head() -> None:
    """The share of each id in the first free slot, and what may never be drawn."""
    prior, text, count = random_prior(SMALL), CAPTION, 20_000
    captions = complete(prior, text, range(count), vocab_size=18)
    assert torch.equal(captions[:, :3], text[:, :3].expand(count, -1))
    with torch.inference_mode():
        logits, _ = prior.logits(text, torch.zeros(1, 36, dtype=torch.int64))
    logits = logits[0, 2, :18].double()
    logits[START_ID] = -math.inf
    wanted = logits.softmax(dim=0) * count
    found = captions[:, 3].bincount(minlength=18)
    assert len(found) == 18  # the ids beyond the tokenizer's stand for no text
    assert found[START_ID] == 0
    frequent = wanted >= 5
    chi_square = ((found - wanted)[frequent] ** 2 / wanted[frequent]).sum()
    cells = int(frequent.sum())
    assert chi_square < cells + 5 * math.sqrt(2 * cells)
    ended = captions[:, 3] == PAD_ID
    assert 0 < int(ended.sum()) < count
    assert (captions[ended, 4] == PAD_ID).all()


def test_a_completed_caption_depends_on_its_seed_alone_and_a_full_one_stays() -> None:
    prior, text = random_prior(SMALL), CAPTION
    together = complete(prior, text, range(6))
    assert torch.equal(complete(prior, text, range(4, 5))[0], together[4])
    full = torch.tensor([[START_ID, 5, 6, 7, 8]])
    assert torch.equal(complete(prior, full, range(2)), full.expand(2, -1))


def test_a_sampler_draws_the_captions_that_it_completed(tmp_path: Path) -> None:
    sampler = tiny_models(tmp_path, rows=8).sampler()
    start = Start(complete_captions=True)
    (samples,) = sampler.sample(["red"], n=3, seed=1, start=start)
    assert len({sample.caption for sample in samples}) == 3
    assert all(sample.caption.startswith("red") for sample in samples)
    (alone,) = sampler.sample(["red"], n=1, seed=2, start=start)
    assert alone[0].caption == samples[1].caption
    assert np.array_equal(alone[0].tokens, samples[1].tokens)
    (plain,) = sampler.sample(["red"], n=1, seed=1)
    assert plain[0].caption == ""


def test_a_caption_whose_logits_are_not_finite_is_not_completed() -> None:
    prior = random_prior(SMALL)
    with torch.no_grad():
        prior.text_position[3, 0] = math.nan
    with pytest.raises(NonFiniteLogits, match=r"text slot 4 of 5 .* embeddings at text slot 3"):
        complete(prior, CAPTION, range(50))
