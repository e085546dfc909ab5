import copy
import gc

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from models.dvae import DVAE, DVAEConfig
from models.fast_encoder import FastEncoder, PlainConv2d, Precision
from models.likelihood import map_pixels
from models.onednn import PackedConv2d, RowWinograd, usable
from models.stage_one import Encoder
from models.vqvae import VQVAE, VQVAEConfig
from tests.fixtures.peers import need_peer

TOLERANCE = 1e-5  # of the features' norm: what another order of summation may change
ONEDNN = usable(torch.float32)


def encoder_of(feature_width: int = 40, **sizes: int) -> Encoder:
    """Random weights, biases too, and residual paths as strong as the skip paths."""
    torch.manual_seed(0)
    config = DVAEConfig(image_size=64, vocab_size=64, **sizes)
    encoder = Encoder(config, feature_width)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith(".b"):
                parameter.normal_()
            elif "conv_4" in name:
                parameter.div_(config.residual_gain)
    return encoder


def pictures(*shape: int) -> Tensor:
    return map_pixels(torch.rand(*shape, generator=torch.Generator().manual_seed(1)))


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"n_hid": 8}, (2, 3, 32, 32)),
        ({"n_hid": 12, "n_blk_per_group": 3}, (1, 3, 24, 40)),  # a gain of 1/144
        ({"n_hid": 16, "group_count": 1}, (3, 3, 7, 5)),
        ({"n_hid": 64, "group_count": 3, "n_blk_per_group": 1}, (2, 3, 20, 36)),  # 1/9
        (
            {"n_hid": 256, "group_count": 1, "n_blk_per_group": 1},
            (2, 3, 13, 6),
        ),  # 3 tiles and a row
        ({"n_hid": 256, "group_count": 2, "n_blk_per_group": 1}, (1, 3, 2, 2)),
        ({"n_hid": 64, "group_count": 4}, (17, 3, 64, 64)),  # two parts, the second of one picture
        ({"n_hid": 256, "group_count": 1, "n_blk_per_group": 1}, (1, 3, 96, 72)),  # several chunks
    ],
)
def test_the_features_are_the_encoders(sizes: dict[str, int], shape: tuple[int, ...]) -> None:
    encoder, x = encoder_of(**sizes), pictures(*shape)
    before = x.clone()
    theirs = encoder(x).detach()
    ours = FastEncoder(encoder, "fp32")(x)
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float32
    assert distance(ours, theirs) < TOLERANCE
    assert torch.equal(x, before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_onednn_the_features_are_the_same(precision: Precision) -> None:
    encoder, x = encoder_of(n_hid=64, group_count=3), pictures(2, 3, 16, 24)
    with torch.backends.mkldnn.flags(enabled=False):
        fast = FastEncoder(encoder, precision)
        assert isinstance(fast._head, PlainConv2d)
        plain = fast(x)
    bound = TOLERANCE if precision == "fp32" else 0.02
    assert distance(plain, encoder(x).detach()) < bound
    assert distance(FastEncoder(encoder, precision)(x), plain) < bound


def test_bf16_is_close_to_fp32_and_gives_fp32() -> None:
    encoder, x = encoder_of(n_hid=64), pictures(2, 3, 64, 64)
    features = FastEncoder(encoder, "bf16")(x)
    assert features.dtype == torch.float32
    assert 0 < distance(features, encoder(x).detach()) < 0.02


@pytest.mark.parametrize("kind", ["dvae", "vqvae"])
def test_a_model_encodes_as_before(kind: str) -> None:
    torch.manual_seed(0)
    sizes = {"image_size": 32, "vocab_size": 24, "n_hid": 16, "n_init": 6}
    model = DVAE(DVAEConfig(**sizes)) if kind == "dvae" else VQVAE(VQVAEConfig(**sizes))
    pixels = torch.rand(3, 3, 32, 32)
    tokens = model.encode(pixels)
    model.encoder = FastEncoder(model.encoder, "fp32")
    assert torch.equal(model.encode(pixels), tokens)
    assert model.decode(tokens).shape == pixels.shape


def test_a_model_that_learnt_something_gets_nearly_the_same_codes_in_bf16() -> None:
    """Random weights give nearly tied codes; these have learnt which of 8 colours a square has."""
    torch.manual_seed(0)
    sizes = {"n_hid": 64, "group_count": 3, "n_blk_per_group": 1}
    model = DVAE(DVAEConfig(image_size=16, vocab_size=8, n_init=8, **sizes))
    optimizer = torch.optim.Adam(model.encoder.parameters(), lr=3e-3)
    for _ in range(16):
        pixels, tokens = coloured_squares()
        loss = F.cross_entropy(model.logits(pixels), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pixels, tokens = coloured_squares()
    exact = model.encode(pixels)
    assert float((exact == tokens).float().mean()) > 0.8
    model.encoder = FastEncoder(model.encoder, "bf16")
    assert float((model.encode(pixels) == exact).float().mean()) > 0.98


def coloured_squares() -> tuple[Tensor, Tensor]:
    """Squares of 4x4 pixels, each of one of the cube's corner colours, with noise; and which."""
    tokens = torch.randint(8, (4, 4, 4))
    colours = torch.stack([tokens & 1, tokens >> 1 & 1, tokens >> 2], dim=1).float()
    pixels = colours.repeat_interleave(4, 2).repeat_interleave(4, 3)
    return (pixels + 0.3 * torch.rand_like(pixels)) / 1.3, tokens


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_of_the_encoder_is_kept(precision: Precision) -> None:
    encoder, x = encoder_of(n_hid=64), pictures(1, 3, 16, 16)
    fast = FastEncoder(encoder, precision)
    held = [StorageWeakRef(p.untyped_storage()) for p in encoder.parameters()]
    assert not any(storage.expired() for storage in held)
    before = fast(x)
    del encoder
    gc.collect()
    assert all(storage.expired() for storage in held)
    assert torch.equal(fast(x), before)


def test_there_is_nothing_to_train_or_save() -> None:
    fast = FastEncoder(encoder_of(n_hid=8), "fp32")
    assert not list(fast.parameters())
    assert not fast.state_dict()


def test_it_works_with_and_without_inference_mode_and_gives_no_gradients() -> None:
    encoder, x = encoder_of(n_hid=64), pictures(1, 3, 32, 32)
    assert all(p.requires_grad for p in encoder.parameters())
    fast = FastEncoder(encoder, "fp32")
    with torch.inference_mode():
        inside = fast(x)
    outside = fast(x.requires_grad_())
    assert torch.equal(inside, outside)
    assert not outside.requires_grad


def test_autocast_changes_nothing() -> None:
    fast, x = FastEncoder(encoder_of(n_hid=16), "fp32"), pictures(1, 3, 16, 16)
    with torch.backends.mkldnn.flags(enabled=False):
        plain = FastEncoder(encoder_of(n_hid=16), "fp32")
    for encoder in (fast, plain):
        with torch.autocast("cpu", torch.bfloat16):
            under = encoder(x)
        assert torch.equal(under, encoder(x))


def test_pictures_of_another_size_may_come_next() -> None:
    """Weights are packed for a number of pixels, and anew when it changes."""
    encoder = encoder_of(n_hid=64)
    fast = FastEncoder(encoder, "fp32")
    for side in (64, 8, 128, 64):
        x = pictures(1, 3, side, side)
        assert distance(fast(x), encoder(x).detach()) < TOLERANCE


@pytest.mark.skipif(not ONEDNN, reason="this torch has no oneDNN")
def test_a_packed_convolution_adds_in_place() -> None:
    torch.manual_seed(0)
    w, b, x, total = torch.randn(6, 5, 1, 1), torch.randn(6), *pair_of((2, 5, 4, 3), (2, 6, 4, 3))
    want = total + F.conv2d(x, w, b)
    PackedConv2d(w, b).add_to(total, x)
    torch.testing.assert_close(total, want)


@pytest.mark.skipif(not ONEDNN, reason="this torch has no oneDNN")
@pytest.mark.parametrize("height", [1, 3, 4, 5, 18, 300])
def test_winograd_is_the_convolution_of_the_relu(height: int) -> None:
    torch.manual_seed(0)
    w, b, (x,) = torch.randn(7, 64, 3, 3), torch.randn(7), pair_of((2, 64, height, 40))
    ours = RowWinograd(w, b)(x)
    theirs = F.conv2d(F.relu(x).double(), w.double(), b.double(), padding=1).float()
    assert ours.shape == theirs.shape
    assert distance(ours, theirs) < 2e-6


def pair_of(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape).to(memory_format=torch.channels_last) for shape in shapes]


@pytest.mark.parametrize(
    ("precision", "words"),
    [
        ("fp64", "precision must be one of fp32, bf16, fp16, got 'fp64'"),
        ("fp16", "precision must be fp32 or bf16 on a CPU, got 'fp16'"),
    ],
)
def test_a_wrong_precision_is_refused_in_words(precision: Precision, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FastEncoder(encoder_of(n_hid=8), precision)


@pytest.mark.parametrize("other", [nn.Identity(), FastEncoder(encoder_of(n_hid=8), "fp32")])
def test_what_is_no_encoder_is_refused(other: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"stage_one.Encoder, got {type(other).__name__}"):
        FastEncoder(other, "fp32")


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.rand(3, 16, 16), r"\(B, 3, H, W\)"),
        (torch.rand(1, 1, 16, 16), r"\(B, 3, H, W\)"),
        (torch.rand(0, 3, 16, 16), "B >= 1"),
        (torch.rand(1, 3, 16, 16, dtype=torch.float64), "float32"),
        (torch.rand(1, 3, 16, 16, device="meta"), "must be on cpu"),
    ],
)
def test_wrong_pixels_are_refused_in_words(x: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FastEncoder(encoder_of(n_hid=8), "fp32")(x)


def test_the_features_are_those_of_the_released_package() -> None:
    peer = need_peer("dall_e")
    torch.manual_seed(0)
    encoder = Encoder(DVAEConfig(image_size=64, vocab_size=512, n_hid=64), 512)
    theirs = peer.Encoder(n_hid=64, vocab_size=512)
    theirs.load_state_dict(copy.deepcopy(encoder.state_dict()))
    x = pictures(2, 3, 64, 64)
    assert distance(FastEncoder(encoder, "fp32")(x), theirs(x).detach()) < TOLERANCE
