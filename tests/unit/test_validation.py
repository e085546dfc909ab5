"""Losses on held-out rows, on one rank and two, with both kinds of weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from models.prior import PriorConfig
from pipelines.data.split import VALIDATION
from pipelines.data.stage import Manifest
from pipelines.data.tokenizer import CaptionTokenizer
from pipelines.evaluation.losses import token_losses
from pipelines.training.parallelize import plain_named_parameters
from pipelines.training.prior_loop import load_weights
from pipelines.training.prior_trainer import PriorTrainer
from pipelines.training.prior_training import Cadence, ShardingConfig
from pipelines.training.token_loader import TokenLoader, read_tokens
from pipelines.training.validation import HeldOut
from tests.fixtures.datasets import TinyTokens, tiny_tokens
from tests.fixtures.ranks import on_ranks
from tests.fixtures.tiny_training import tiny_training

MODEL = PriorConfig(
    n_layers=2,
    n_heads=2,
    d_model=16,
    text_len=12,
    text_vocab_size=512,
    grid=4,
    image_vocab_size=32,
    conv_kernel=3,
)
HELD_OUT = 7  # on two ranks one has nothing left for its last batch


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyTokens:
    path = tmp_path_factory.mktemp("tokens")
    return tiny_tokens(path, rows=30, grid=4, image_vocab_size=32, held_out=HELD_OUT)


def held_out_of(tiny: TinyTokens, samples: int = 1000) -> HeldOut:
    tokenizer = CaptionTokenizer.from_file(tiny.tokenizer)
    manifest = Manifest.load(tiny.tokens, stage="encode_pairs")
    return HeldOut(manifest, tokenizer, text_len=MODEL.text_len, samples=samples)


def train_and_validate(tiny: TinyTokens, keep_gathered: bool = False) -> dict[str, Any]:
    """A few updates with a look after each; losses, weights, and what they would be without."""
    how = tiny_training(
        batch_samples=4, micro_batches=2, sharding=ShardingConfig(keep_gathered=keep_gathered)
    )
    outcome: dict[str, Any] = {"looks": []}
    for looks in (True, False):
        trainer = PriorTrainer(MODEL, how, torch.device("cpu"))
        ranked = dist.is_initialized()
        loader = TokenLoader(
            Manifest.load(tiny.tokens, stage="encode_pairs"),
            CaptionTokenizer.from_file(tiny.tokenizer),
            text_len=MODEL.text_len,
            batch_samples=4,
            bpe_dropout=0.1,
            seed=0,
            rank=dist.get_rank() if ranked else 0,
            world_size=dist.get_world_size() if ranked else 1,
        )
        for step in range(3):
            trainer.update(loader.batch(step))
            if looks:
                outcome["looks"].append(trainer.held_out_losses(held_out_of(tiny)))
        outcome[f"average-{looks}"] = trainer.averaged_weights()
        own = plain_named_parameters(trainer.prior)
        outcome[f"own-{looks}"] = {
            k: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().clone()
            for k, v in own
        }
    return outcome


def reference(tiny: TinyTokens, weights: dict[str, torch.Tensor]) -> tuple[float, float]:
    """The evaluation's losses of the same rows."""
    manifest = Manifest.load(tiny.tokens, stage="encode_pairs")
    tokenizer = CaptionTokenizer.from_file(tiny.tokenizer)
    _, captions, image = read_tokens(manifest, VALIDATION)
    text = torch.stack([torch.tensor(tokenizer.encode(c, MODEL.text_len)).long() for c in captions])
    images = torch.from_numpy(image.astype("int64"))
    prior = load_weights(MODEL, weights)
    losses = token_losses(prior, text, images, batch_samples=7, on_rows=lambda count: None)
    return losses.text, losses.image


def check(tiny: TinyTokens, outcome: dict[str, Any]) -> None:
    last = outcome["looks"][-1]
    for prefix, weights in (("", "own-True"), ("average.", "average-True")):
        text, image = reference(tiny, outcome[weights])
        assert last[f"validation.{prefix}text_loss"] == pytest.approx(text, rel=1e-5)
        assert last[f"validation.{prefix}image_loss"] == pytest.approx(image, rel=1e-5)
    assert last["validation.image_loss"] != last["validation.average.image_loss"]
    for kind in ("own", "average"):
        for name, value in outcome[f"{kind}-False"].items():
            assert torch.equal(value, outcome[f"{kind}-True"][name]), name


def test_the_losses_are_those_of_the_evaluation_and_looking_changes_nothing(
    tiny: TinyTokens,
) -> None:
    check(tiny, train_and_validate(tiny))


def train_and_validate_twice(tiny: TinyTokens) -> list[dict[str, Any]]:
    return [train_and_validate(tiny, keep_gathered) for keep_gathered in (False, True)]


def test_two_sharded_ranks_measure_what_one_does(tiny: TinyTokens, tmp_path: Path) -> None:
    for outcome in on_ranks(train_and_validate_twice, 2, tmp_path, tiny):
        check(tiny, outcome)


def test_the_same_rows_at_every_look_and_no_more_than_asked_for(tiny: TinyTokens) -> None:
    whole, some = held_out_of(tiny), held_out_of(tiny, samples=3)
    assert (len(whole), len(some)) == (HELD_OUT, 3)
    assert some.captions == held_out_of(tiny, samples=3).captions
    counted = [count for rank in range(2) for _, count in whole.shares(2, rank, 2)]
    assert sum(counted) == HELD_OUT
    manifest = Manifest.load(tiny.tokens, stage="encode_pairs")
    learned = read_tokens(manifest, "train")[0]
    assert len(learned) == 30 - HELD_OUT


def test_a_cadence_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cadence.validate_every must be at least 1, got 0"):
        Cadence(validate_every=0)
