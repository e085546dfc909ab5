"""Captions left empty in training, without which sampling cannot be guided."""

import pytest
import torch

from models.prior import PAD_ID, START_ID
from pipelines.data.stage import Manifest
from pipelines.data.tokenizer import CaptionTokenizer
from pipelines.sampling.image_tokens import null_prompt
from pipelines.training.prior_training import PriorTraining
from pipelines.training.token_loader import TokenLoader
from tests.fixtures.datasets import TinyTokens, tiny_tokens
from tests.fixtures.models import TINY


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyTokens:
    return tiny_tokens(tmp_path_factory.mktemp("tokens"), rows=40)


def loader(
    tiny: TinyTokens, caption_dropout: float, *, rank: int = 0, world_size: int = 1
) -> TokenLoader:
    return TokenLoader(
        Manifest.load(tiny.tokens),
        CaptionTokenizer.from_file(tiny.tokenizer),
        text_len=TINY.text_len,
        batch_samples=40,
        bpe_dropout=0.1,
        seed=3,
        caption_dropout=caption_dropout,
        rank=rank,
        world_size=world_size,
    )


def test_an_empty_caption_is_the_null_prompt_and_the_others_stay_as_they_were(
    tiny: TinyTokens,
) -> None:
    plain, dropping = loader(tiny, 0.0), loader(tiny, 0.3)
    null = null_prompt(TINY, torch.zeros(1, 1))[0]
    assert null.tolist() == [START_ID] + [PAD_ID] * (TINY.text_len - 1)
    dropped = 0
    for step in range(10):
        whole, part = plain.batch(step), dropping.batch(step)
        assert torch.equal(whole.image_tokens, part.image_tokens)
        empty = (part.text_tokens == null).all(dim=1)
        assert torch.equal(part.text_tokens[~empty], whole.text_tokens[~empty])
        dropped += int(empty.sum())
    assert 90 <= dropped <= 150  # of 400; the standard deviation is 9


def test_which_captions_are_dropped_is_a_function_of_the_step_on_any_number_of_ranks(
    tiny: TinyTokens,
) -> None:
    fresh, used = loader(tiny, 0.5), loader(tiny, 0.5)
    for step in (0, 5, 2):
        used.batch(step)
    wanted = fresh.batch(7).text_tokens
    assert torch.equal(used.batch(7).text_tokens, wanted)
    parts = [loader(tiny, 0.5, rank=rank, world_size=4).batch(7) for rank in range(4)]
    assert torch.equal(torch.cat([part.text_tokens for part in parts]), wanted)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="caption_dropout must be in"):
        PriorTraining(caption_dropout=share)
