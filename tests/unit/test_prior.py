"""The prior: causality, padding, losses, and the sizes that the paper gives."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.configs.train_prior import PRESETS
from models.attention import LayerKind, MaskedAttention, stream_mask
from models.prior import (
    PAD_ID,
    START_ID,
    AttentionResblock,
    Prior,
    PriorConfig,
    count_parameters,
)
from pipelines.training.training_plan import GIB, plan_training
from tests.fixtures.models import random_prior

SMALL = PriorConfig(
    n_layers=3,
    n_heads=2,
    d_model=16,
    text_len=6,
    text_vocab_size=20,
    grid=4,
    image_vocab_size=12,
    conv_kernel=3,
)
KINDS: list[LayerKind] = ["row", "column", "conv", "full"]


def one_layer_prior(kind: LayerKind) -> Prior:
    """A prior of a single layer, of this kind."""
    prior = random_prior(dataclasses.replace(SMALL, n_layers=1, attention="full"))
    layer = prior.resblocks[0]
    assert isinstance(layer, AttentionResblock)
    layer.kind = kind
    return prior


class DenseAttention(MaskedAttention):
    """The reference: every score is made, then the mask hides most of them."""

    def __call__(self, kind: LayerKind, qkv: Tensor) -> Tensor:
        mask = stream_mask(kind, self.text_len, self.grid, self.conv_kernel)
        q, k, v = qkv
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def tokens(config: PriorConfig, *, batch: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(2, config.text_vocab_size, (batch, config.text_len), generator=generator)
    text[:, 0] = START_ID
    image = torch.randint(
        0, config.image_vocab_size, (batch, config.image_len), generator=generator
    )
    return text, image


@torch.inference_mode()
def influence(prior: Prior) -> Tensor:
    """Bool (T, T): the output scoring token t (a row) changes if token s (a column) is another.

    Row 0 is empty: nothing scores the start token.
    """
    config = prior.config
    text, image = tokens(config)
    before = torch.cat([logits.flatten(0, 1).sum(-1) for logits in weigh(prior, text, image)])
    changed = torch.zeros(config.stream_len, config.stream_len, dtype=torch.bool)
    for position in range(config.stream_len):
        other_text, other_image = text.clone(), image.clone()
        if position < config.text_len:
            other_text[0, position] = (text[0, position] + 7) % config.text_vocab_size
        else:
            place = position - config.text_len
            other_image[0, place] = (image[0, place] + 5) % config.image_vocab_size
        after = weigh(prior, other_text, other_image)
        difference = torch.cat([logits.flatten(0, 1).sum(-1) for logits in after]) - before
        changed[1:, position] = difference != 0
    return changed


def weigh(prior: Prior, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Logits with a weight a code, so that a sum over codes does not cancel changes."""
    text_logits, image_logits = prior.logits(text, image)
    return (
        text_logits.double() * torch.arange(1, text_logits.shape[-1] + 1),
        image_logits.double() * torch.arange(1, image_logits.shape[-1] + 1),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_future_token_never_changes_an_earlier_logit(kind: LayerKind) -> None:
    changed = influence(one_layer_prior(kind))
    # The logits of token t come from the output at t - 1: neither t nor anything after it counts.
    assert not changed.triu().any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_looks_exactly_where_its_mask_says(kind: LayerKind) -> None:
    changed = influence(one_layer_prior(kind))
    mask = stream_mask(kind, SMALL.text_len, SMALL.grid, SMALL.conv_kernel)
    assert torch.equal(changed[1:], mask[:-1])


@pytest.mark.parametrize("attention", ["sparse", "full"])
def test_losses_and_gradients_are_those_of_dense_masked_attention(attention: Any) -> None:
    config = dataclasses.replace(SMALL, attention=attention)
    mine, reference = random_prior(config), random_prior(config)
    attend = DenseAttention(config.text_len, config.grid, config.conv_kernel)
    for resblock in reference.resblocks:
        if isinstance(resblock, AttentionResblock):
            resblock.attend = attend
    text, image = tokens(config, batch=3)
    losses, wanted = mine(text, image), reference(text, image)
    torch.testing.assert_close(losses, wanted)
    losses.total.backward()
    wanted.total.backward()
    others = dict(reference.named_parameters())
    for name, parameter in mine.named_parameters():
        torch.testing.assert_close(parameter.grad, others[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attention", ["sparse", "full"])
def test_the_whole_prior_is_causal_and_its_text_never_sees_the_picture(attention: Any) -> None:
    changed = influence(random_prior(dataclasses.replace(SMALL, attention=attention)))
    assert not changed.triu().any()
    assert not changed[: SMALL.text_len, SMALL.text_len :].any()
    assert changed[-1, 0]  # the last token knows of the start token
    assert changed[SMALL.text_len :, : SMALL.text_len].all()


def test_each_padding_slot_has_an_embedding_of_its_own() -> None:
    prior = random_prior(SMALL)
    text, image = tokens(SMALL)
    text[0, 3:] = PAD_ID
    prior(text, image).total.backward()
    gradient = prior.pad_embedding.grad
    assert gradient is not None
    assert (gradient != 0).any(dim=1).tolist() == [False, False, False, True, True, True]
    embedded = prior.embed_text(text)[0] - prior.text_position
    assert torch.allclose(embedded[3:], prior.pad_embedding[3:], atol=1e-6)
    assert not torch.allclose(embedded[4], embedded[5], atol=1e-2)


def test_the_loss_is_an_eighth_text_and_seven_eighths_image_each_a_mean_over_its_tokens() -> None:
    prior = random_prior(SMALL)
    text, image = tokens(SMALL, batch=3)
    text[0, 3:] = PAD_ID
    text[1, 5:] = PAD_ID
    with torch.no_grad():
        losses = prior(text, image)
        text_logits, image_logits = prior.logits(text, image)
    wanted = []
    for row in range(3):
        for slot in range(1, SMALL.text_len):
            ended = text[row, slot] == PAD_ID and text[row, slot - 1] == PAD_ID
            if not ended:  # the first padding ends the caption and counts, later ones do not
                wanted.append(F.cross_entropy(text_logits[row, slot - 1], text[row, slot]))
    assert len(wanted) == 3 + 5 + 5
    assert torch.allclose(losses.text, torch.stack(wanted).mean())
    per_token = F.cross_entropy(image_logits.permute(0, 2, 1), image, reduction="none")
    assert torch.allclose(losses.image, per_token.mean())
    assert torch.allclose(losses.total, losses.text / 8 + losses.image * 7 / 8)


def test_a_fresh_prior_finds_every_token_equally_likely() -> None:
    prior = Prior(SMALL)
    prior.init_weights(0)
    with torch.no_grad():
        losses = prior(*tokens(SMALL, batch=4))
    assert float(losses.image) == pytest.approx(math.log(SMALL.image_vocab_size), abs=0.1)
    assert float(losses.text) == pytest.approx(math.log(SMALL.text_vocab_size), abs=0.1)


def test_the_default_prior_is_the_paper_s() -> None:
    config = PriorConfig()
    with torch.device("meta"):
        prior = Prior(config)
    parameters = sum(parameter.numel() for parameter in prior.parameters())
    assert len(prior.resblocks) == config.n_resblocks == 128
    assert sum(isinstance(resblock, AttentionResblock) for resblock in prior.resblocks) == 64
    assert (config.head_dim, config.stream_len) == (64, 1280)
    assert prior.resblocks[1].c_fc.weight.shape == (4 * 3968, 3968)
    assert parameters == pytest.approx(12.29e9, abs=0.005e9)
    # The two matrices of each resblock kind, which the paper's 12 billion are counted from.
    blocks = sum(parameter.numel() for parameter in prior.resblocks.parameters())
    assert blocks == pytest.approx(12 * 64 * 3968**2, rel=1e-3)


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("tiny", 1_620_032),
        ("small", 123_271_680),
        ("1b", 983_018_496),
        ("2.8b", 2_928_258_816),
        ("5.6b", 5_684_999_424),
        ("12b", 12_292_833_024),
        ("12b-one-gpu", 12_292_833_024),
    ],
)
def test_a_preset_has_the_parameters_and_the_cost_that_its_help_says(
    preset: str, parameters: int
) -> None:
    said, job = PRESETS[preset]
    training, workers = job.training, job.workers.num_workers
    assert count_parameters(job.prior) == parameters
    assert f"{parameters:,} parameters" in said
    assert job.prior.head_dim == 64 or preset == "tiny"
    together, rest = divmod(training.batch_samples, workers * training.micro_batches)
    assert rest == 0
    if preset != "tiny":
        plan = plan_training(job.prior, training, workers, job.plan)
        assert plan.fits
        assert f"{plan.peak / GIB:.1f} GiB for {together} picture" in said
        assert f"{plan.flop:.1e}".replace("e+", "e") + " FLOP" in said


def test_layers_follow_the_paper_s_pattern_unless_attention_is_full() -> None:
    kinds = PriorConfig().kinds
    assert kinds[:6] == ("row", "column", "row", "row", "row", "column")
    assert kinds.index("conv") == 63
    assert set(PriorConfig(attention="full").kinds) == {"full"}


@pytest.mark.parametrize(
    ("field", "value"),
    [("n_layers", 0), ("n_heads", 0), ("n_heads", 7), ("text_len", 1), ("grid", 0)],
)
def test_impossible_sizes_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(SMALL, **{field: value})


@pytest.mark.parametrize(
    ("which", "wrong"),
    [
        ("text_tokens", torch.full((1, 6), 20)),
        ("text_tokens", torch.full((1, 6), -1)),
        ("text_tokens", torch.ones(1, 5, dtype=torch.int64)),
        ("image_tokens", torch.full((1, 16), 12)),
        ("image_tokens", torch.zeros(1, 16)),
        ("image_tokens", torch.zeros(16, dtype=torch.int64)),
    ],
)
def test_tokens_out_of_range_or_of_a_wrong_shape_are_refused(which: str, wrong: Tensor) -> None:
    text, image = tokens(SMALL)
    given = {"text_tokens": text, "image_tokens": image} | {which: wrong}
    with pytest.raises(ValueError, match=which):
        random_prior(SMALL).logits(**given)
