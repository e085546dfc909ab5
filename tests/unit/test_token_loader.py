"""Batches of tokens are a function of one integer."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models.prior import PriorConfig
from pipelines.data.stage import Manifest
from pipelines.data.storage import sha256_file
from pipelines.data.tokenizer import CaptionTokenizer
from pipelines.training.token_loader import TokenLoader, check_inputs, read_tokens
from tests.fixtures.datasets import TinyTokens, tiny_tokens

TEXT_LEN = 24


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyTokens:
    return tiny_tokens(tmp_path_factory.mktemp("tokens"), rows=40)


def loader(
    tiny: TinyTokens, rank: int = 0, world_size: int = 1, dropout: float = 0.1
) -> TokenLoader:
    return TokenLoader(
        Manifest.load(tiny.tokens),
        CaptionTokenizer.from_file(tiny.tokenizer),
        text_len=TEXT_LEN,
        batch_samples=8,
        bpe_dropout=dropout,
        seed=3,
        rank=rank,
        world_size=world_size,
    )


def test_an_epoch_has_every_row_once_and_the_next_one_another_order(tiny: TinyTokens) -> None:
    whole = loader(tiny, dropout=0.0)
    epochs = [
        torch.cat([whole.batch(step).image_tokens for step in steps])
        for steps in (range(5), range(5, 10))
    ]
    stored = np.sort(read_tokens(Manifest.load(tiny.tokens))[2].astype(np.int64), axis=0)
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch.numpy(), axis=0), stored)
    assert not torch.equal(*epochs)


def test_ranks_share_the_batch_of_one(tiny: TinyTokens) -> None:
    whole = loader(tiny).batch(4)
    parts = [loader(tiny, rank, 4).batch(4) for rank in range(4)]
    assert torch.equal(torch.cat([part.text_tokens for part in parts]), whole.text_tokens)
    assert torch.equal(torch.cat([part.image_tokens for part in parts]), whole.image_tokens)


def test_a_batch_does_not_depend_on_what_was_read_before(tiny: TinyTokens) -> None:
    fresh, used = loader(tiny), loader(tiny)
    for step in (0, 9, 2):
        used.batch(step)
    assert torch.equal(fresh.batch(7).text_tokens, used.batch(7).text_tokens)


def test_shards_of_another_tokenizer_dvae_or_size_are_refused(
    tiny: TinyTokens, tmp_path: Path
) -> None:
    manifest = Manifest.load(tiny.tokens)
    tokenizer = CaptionTokenizer.from_file(tiny.tokenizer)
    digest = sha256_file(tiny.dvae)
    fits = PriorConfig(
        n_layers=1, n_heads=1, d_model=8, text_len=TEXT_LEN, grid=8, image_vocab_size=128
    )
    check_inputs(manifest, fits, tokenizer, dvae_digest=digest)
    with pytest.raises(ValueError, match=f"dvae {digest}.* is {'0' * 64}"):
        check_inputs(manifest, fits, tokenizer, dvae_digest="0" * 64)
    other = tiny_tokens(tmp_path / "other", rows=12)
    with pytest.raises(ValueError, match=f"tokenizer {tokenizer.digest}"):
        check_inputs(
            manifest, fits, CaptionTokenizer.from_file(other.tokenizer), dvae_digest=digest
        )
    small = PriorConfig(
        n_layers=1, n_heads=1, d_model=8, text_len=TEXT_LEN, grid=4, image_vocab_size=128
    )
    with pytest.raises(ValueError, match="grid must be 8"):
        check_inputs(manifest, small, tokenizer, dvae_digest=digest)
