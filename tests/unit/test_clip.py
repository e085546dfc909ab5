"""The contrastive model: its towers, its loss, its first weights."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip import LARGEST_SCALE, Clip, ClipConfig, contrastive_loss

SIZES: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 8,
    "image_width": 24,
    "image_layers": 2,
    "image_heads": 3,
    "text_len": 6,
    "vocab_size": 20,
    "text_width": 16,
    "text_layers": 2,
    "text_heads": 2,
    "embed_width": 12,
}


def clip(**more: Any) -> Clip:
    model = Clip(ClipConfig(**(SIZES | more)))
    model.init_weights(0)
    return model


def pictures(count: int) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def captions(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, 20, (count, 6), generator=generator)
    return tokens, torch.randint(1, 6, (count,), generator=generator)


def test_what_follows_a_captions_end_does_not_count() -> None:
    tokens, ends = captions(5)
    changed = tokens.clone()
    for row, end in enumerate(ends.tolist()):
        changed[row, end + 1 :] = 0
    model = clip()
    torch.testing.assert_close(model.encode_texts(tokens, ends), model.encode_texts(changed, ends))
    changed[0, ends[0]] = (tokens[0, ends[0]] + 1) % 20
    different = model.encode_texts(changed, ends)
    assert not torch.allclose(different[0], model.encode_texts(tokens, ends)[0], atol=1e-3)


def test_vectors_have_length_one_and_do_not_depend_on_the_batch() -> None:
    model = clip().eval()
    together = model.encode_images(pictures(7))
    torch.testing.assert_close(together.norm(dim=1), torch.ones(7))
    alone = torch.cat([model.encode_images(picture[None]) for picture in pictures(7)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_the_loss_is_the_papers_figure_3() -> None:
    """Written there as a symmetric cross-entropy of the matrix of scaled cosines."""
    model = clip()
    images, texts = model.encode_images(pictures(5)), model.encode_texts(*captions(5))
    logits = (images @ texts.T * math.exp(float(model.logit_scale))).detach()
    labels = torch.arange(5)
    wanted = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    matching = contrastive_loss(images, texts, model.scale())
    torch.testing.assert_close(matching.loss.detach(), wanted)
    assert float(matching.accuracy) == float((logits.argmax(1) == labels).float().mean())


def test_the_temperature_starts_at_the_papers_and_is_bounded_as_there() -> None:
    model = clip()
    assert float(model.scale()) == pytest.approx(1 / 0.07)
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    model.clamp_scale()
    assert float(model.scale()) == pytest.approx(LARGEST_SCALE)


def test_first_weights_depend_on_seed_and_name_alone() -> None:
    shallow, deep = clip(), clip(text_layers=3)
    torch.testing.assert_close(
        shallow.text.resblocks[1].c_fc.weight, deep.text.resblocks[1].c_fc.weight
    )
    other = Clip(ClipConfig(**SIZES))
    other.init_weights(1)
    assert not torch.equal(other.text.embedding.weight, shallow.text.embedding.weight)
    spread = float(clip(text_width=256).text.resblocks[0].c_fc.weight.std())
    assert spread == pytest.approx((2 * 256) ** -0.5, rel=0.05)


def test_the_defaults_are_the_papers_vit_b_32() -> None:
    with torch.device("meta"):
        model = Clip(ClipConfig(image_size=224, vocab_size=49_408))
    # 151,277,313 is what CLIP's released ViT-B/32 has.
    assert sum(parameter.numel() for parameter in model.parameters()) == 151_277_313


@pytest.mark.parametrize("precision", [torch.bfloat16])
def test_half_precision_gives_nearly_the_same_vectors(precision: torch.dtype) -> None:
    model = clip().eval()
    with torch.autocast("cpu", precision):
        half = model.encode_images(pictures(4))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, model.encode_images(pictures(4)), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 20},
        {"patch_size": 0},
        {"image_heads": 5},
        {"text_heads": 0},
        {"text_len": 1},
        {"image_layers": 0},
        {"activation": "relu"},
    ],
)
def test_impossible_sizes_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ClipConfig(**(SIZES | wrong))


def test_other_pictures_and_captions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pixels must be \(B, 3, 16, 16\), got \(1, 3, 8, 8\)"):
        clip().encode_images(torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"tokens must be \(B, 6\)"):
        clip().encode_texts(torch.zeros(1, 7, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
