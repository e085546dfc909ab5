"""Cached steps: the logits of the full forward, from caches that hold what the masks can see."""

import dataclasses
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import LayerKind, image_mask
from models.prior import PAD_ID, START_ID, AttentionResblock, Prior, PriorConfig
from pipelines.sampling.caches import LayerCache, image_layout
from pipelines.sampling.decoder import CachedDecoder, CaptionDecoder
from pipelines.sampling.packing import PackedLinear, PackedPrior, PlainLinear, can_pack
from tests.fixtures.models import random_prior

SMALL = PriorConfig(
    n_layers=4,
    n_heads=2,
    d_model=32,
    text_len=5,
    text_vocab_size=20,
    grid=8,
    image_vocab_size=16,
    conv_kernel=5,
)
KINDS: list[LayerKind] = ["row", "column", "conv", "full"]
CPU = torch.device("cpu")


def prior_of(kind: LayerKind | Literal["sparse"], config: PriorConfig) -> Prior:
    """A prior with one kind of layer in all its layers, or with the paper's mixture."""
    if kind == "sparse":
        return random_prior(config)
    prior = random_prior(dataclasses.replace(config, attention="full"))
    for resblock in prior.resblocks:
        if isinstance(resblock, AttentionResblock):
            resblock.kind = kind
    return prior


def full_logits(prior: Prior, text: Tensor, image: Tensor) -> Tensor:
    """Logits (B, grid², K) of the whole stream under dense masks, without a cache."""
    config = prior.config
    total = config.stream_len
    x = torch.cat((prior.embed_text(text), prior.embed_image(image)), dim=1)
    for resblock in prior.resblocks:
        if isinstance(resblock, AttentionResblock):
            mask = torch.ones(total, total, dtype=torch.bool).tril()
            images = image_mask(resblock.kind, config.grid, config.conv_kernel)
            mask[config.text_len :, config.text_len :] = images
            q, k, v = resblock.attn.project(resblock.enter(x))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = resblock.leave(x, resblock.attn.merge(y))
        else:
            x = resblock(x)
    return prior.score_image(prior.ln_final(x[:, config.text_len - 1 : -1]))


def prompts(count: int, config: PriorConfig = SMALL) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    text = torch.randint(2, config.text_vocab_size, (count, config.text_len), generator=generator)
    text[:, 0] = START_ID
    text[:, 3:] = PAD_ID
    return text


def pictures(prompts: int, candidates: int, config: PriorConfig, primed: int = 0) -> Tensor:
    """Random tokens (P · N, grid²), whose first `primed` all candidates of a prompt share."""
    generator = torch.Generator().manual_seed(2)
    shape = (prompts, candidates, config.image_len)
    image = torch.randint(config.image_vocab_size, shape, generator=generator)
    image[:, :, :primed] = image[:, :1, :primed]
    return image.flatten(0, 1)


def decode_given(
    decoder: CachedDecoder, text: Tensor, image: Tensor, primed: int, *, anywhere: bool = False
) -> Tensor:
    """Logits (B, grid² - primed, K) of given image tokens, step by step."""
    logits = [decoder.prefill(text, image[:: decoder.candidates, :primed])]
    for position in range(primed, image.shape[1] - 1):
        if anywhere:
            logits.append(decoder.step_anywhere(image[:, position], torch.tensor([position])))
        else:
            logits.append(decoder.step(image[:, position], position))
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("primed_rows", [0, 1, 3])
@pytest.mark.parametrize(("grid", "conv_kernel"), [(8, 5), (8, 11), (4, 5), (4, 11)])
@pytest.mark.parametrize("kind", [*KINDS, "sparse"])
def test_cached_steps_give_the_logits_of_the_full_forward(
    kind: Any, grid: int, conv_kernel: int, primed_rows: int
) -> None:
    """Each layer kind on its own in every layer, and the paper's mixture."""
    config = dataclasses.replace(SMALL, grid=grid, conv_kernel=conv_kernel)
    prior, text, primed = prior_of(kind, config), prompts(2, config), primed_rows * grid
    image = pictures(2, 3, config, primed)
    with torch.inference_mode():
        wanted = full_logits(prior, text.repeat_interleave(3, dim=0), image)[:, primed:]
    decoder = CachedDecoder(PackedPrior(prior).weights("fp32"), candidates=3)
    got = decode_given(decoder, text, image, primed)
    assert wanted.std() > 0.3  # else small differences would prove nothing
    assert float((got - wanted).abs().max()) <= 1e-5


@pytest.mark.parametrize("kind", ["row", "column", "conv", "full", "sparse"])
def test_a_step_that_knows_its_position_as_a_tensor_gives_the_same(kind: Any) -> None:
    """What a CUDA graph records."""
    prior, text, image = prior_of(kind, SMALL), prompts(2), pictures(2, 3, SMALL, 8)
    decoder = CachedDecoder(PackedPrior(prior).weights("fp32"), candidates=3)
    numbers = decode_given(decoder, text, image, 8)
    tensors = decode_given(decoder, text, image, 8, anywhere=True)
    assert torch.equal(numbers, tensors)


def test_the_step_that_is_recorded_allocates_nothing_that_depends_on_the_position() -> None:
    """The caches stay at their addresses, so that a replay writes where the recording did."""
    decoder = CachedDecoder(PackedPrior(random_prior(SMALL)).weights("fp32"), candidates=2)
    decoder.prefill(prompts(1), torch.zeros(1, 0, dtype=torch.int64))
    before = [cache.kv.data_ptr() for cache in decoder.stack._caches]
    tokens = torch.zeros(2, dtype=torch.int64)
    shapes = {decoder.step_anywhere(tokens, torch.tensor([p])).shape for p in range(64)}
    assert shapes == {(2, 16)}
    assert [cache.kv.data_ptr() for cache in decoder.stack._caches] == before
    # Recording runs a step more than once at its position: that must change nothing.
    decoder.prefill(prompts(1), torch.zeros(1, 0, dtype=torch.int64))
    once = [decoder.step(tokens, p) for p in range(40)]
    decoder.prefill(prompts(1), torch.zeros(1, 0, dtype=torch.int64))
    twice = [(decoder.step(tokens, p), decoder.step(tokens, p))[1] for p in range(40)]
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_bf16_stays_near_fp32() -> None:
    prior, text, image = random_prior(SMALL), prompts(2), pictures(2, 3, SMALL)
    packed = PackedPrior(prior)
    exact, rough = (
        decode_given(CachedDecoder(packed.weights(precision), 3), text, image, 0)
        for precision in ("fp32", "bf16")
    )
    difference = float((exact - rough).norm() / exact.norm())
    assert 1e-4 < difference < 0.03  # of the order of bf16's 2^-8, and really not fp32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_multiply_as_the_layer_does(dtype: torch.dtype) -> None:
    if not can_pack(CPU, dtype):
        pytest.skip(f"oneDNN has no linear layer in {dtype} on this CPU")
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 40), torch.randn(3, 24, dtype=dtype)
    stream = torch.randn(3, 40)
    with torch.inference_mode():
        packed, plain = PackedLinear(layer, dtype), PlainLinear(layer, dtype)
        for one, other in (
            (packed(x), plain(x)),
            (packed.gelu(x), plain.gelu(x)),
            (packed.add(x, stream), plain.add(x, stream)),
        ):
            assert one.dtype == other.dtype
            tolerance = 1e-6 if dtype == torch.float32 else 0.02
            assert float((one - other).abs().max()) <= tolerance


def test_where_onednn_is_missing_a_linear_layer_is_torch_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prior, text, image = random_prior(SMALL), prompts(1), pictures(1, 2, SMALL)
    monkeypatch.setattr("pipelines.sampling.packing.mkl_is_faster", lambda: False)
    ours = decode_given(CachedDecoder(PackedPrior(prior).weights("fp32"), 2), text, image, 0)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    weights = PackedPrior(prior).weights("fp32")
    assert type(weights.image_head) is PlainLinear
    plain = decode_given(CachedDecoder(weights, 2), text, image, 0)
    assert float((ours - plain).abs().max()) <= 1e-5


@pytest.mark.parametrize(("grid", "kernel"), [(5, 3), (4, 11), (8, 5), (32, 11)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_slot_holds_what_the_mask_lets_its_reader_see(
    kind: LayerKind, grid: int, kernel: int
) -> None:
    """Write position after position, and look which ones are found where nothing is hidden."""
    layout, mask = image_layout(kind, grid, kernel), image_mask(kind, grid, kernel)
    slots = torch.full((layout.slabs * layout.ring,), -1)
    for position in range(grid * grid):
        slots[layout.places[position]] = position
        first = int(layout.places[position]) // layout.ring * layout.ring
        seen = slots[first : first + layout.ring][~layout.hidden[position]]
        assert torch.equal(seen.sort().values, mask[position].nonzero().squeeze(1))


def test_rings_are_no_longer_than_the_masks_look_back() -> None:
    def slots(kind: LayerKind) -> tuple[int, int]:
        layout = image_layout(kind, 32, 11)
        return layout.slabs, layout.ring

    assert slots("row") == (1, 33)
    assert slots("column") == (32, 32)
    assert slots("conv") == (1, 5 * 32 + 6)  # five rows up and five columns on, and itself
    assert slots("full") == (1, 1024)


def test_a_candidate_of_the_paper_s_prior_needs_at_most_290_megabytes() -> None:
    paper = PriorConfig()
    total = 0
    shape = (1, paper.n_heads, paper.text_len, paper.head_dim)
    with torch.device("meta"):
        text = torch.empty(shape, dtype=torch.bfloat16)
    for kind in paper.kinds:
        layout = image_layout(kind, paper.grid, paper.conv_kernel)
        one, two = (LayerCache(layout, text, text, candidates) for candidates in (1, 2))
        total += two.kv.nbytes - one.kv.nbytes
        # The text's keys and values are the prompt's, however many candidates it has.
        assert one.text_k.shape == two.text_k.shape
    assert 0.28e9 < total <= 0.29e9
    dense = 2 * paper.n_layers * paper.stream_len * paper.d_model * 2
    assert total < dense / 4


def test_captions_are_decoded_with_the_logits_of_the_full_forward() -> None:
    prior = random_prior(SMALL)
    generator = torch.Generator().manual_seed(1)
    captions = torch.randint(2, 20, (3, 5), generator=generator)
    captions[:, 0], captions[:, 1] = START_ID, 7
    with torch.inference_mode():
        wanted, _ = prior.logits(captions, torch.zeros(3, 64, dtype=torch.int64))
    decoder = CaptionDecoder(PackedPrior(prior).weights("fp32"), candidates=3, length=2)
    got = [decoder.prefill(captions[:1])]
    got += [decoder.step(captions, slot) for slot in (2, 3)]
    assert float((torch.stack(got, dim=1) - wanted[:, 1:]).abs().max()) <= 1e-5
