import pytest
import torch

from models.dvae import DVAE, DVAEConfig
from models.stage_one import ResBlock

SMALL = DVAEConfig(image_size=32, vocab_size=24, n_hid=8, n_init=6, n_blk_per_group=2)


def released_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes in the state dicts of the released encoder.pkl and decoder.pkl."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, n_in: int, n_out: int, kernel: int) -> None:
        shapes[f"{name}.w"] = (n_out, n_in, kernel, kernel)
        shapes[f"{name}.b"] = (n_out,)

    def groups(model: str, first: int, widths: list[int], kernels: list[int]) -> None:
        n_in = first
        for group, n_out in enumerate(widths, 1):
            for block in (1, 2):
                name = f"{model}.blocks.group_{group}.block_{block}"
                if n_in != n_out:
                    conv(f"{name}.id_path", n_in, n_out, 1)
                hidden = n_out // 4
                sizes = [n_in, hidden, hidden, hidden, n_out]
                for i, kernel in enumerate(kernels):
                    conv(f"{name}.res_path.conv_{i + 1}", sizes[i], sizes[i + 1], kernel)
                n_in = n_out

    conv("encoder.blocks.input", 3, 256, 7)
    groups("encoder", 256, [256, 512, 1024, 2048], [3, 3, 3, 1])
    conv("encoder.blocks.output.conv", 2048, 8192, 1)
    conv("decoder.blocks.input", 8192, 128, 1)
    groups("decoder", 128, [2048, 1024, 512, 256], [1, 3, 3, 3])
    conv("decoder.blocks.output.conv", 256, 6, 1)
    return shapes


def test_the_default_model_has_the_released_names_shapes_and_sizes() -> None:
    with torch.device("meta"):
        model = DVAE(DVAEConfig())
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == released_shapes()
    assert sum(p.numel() for p in model.encoder.parameters()) == 53_786_240
    assert sum(p.numel() for p in model.decoder.parameters()) == 43_829_766
    assert model.config.grid == 32
    assert model.config.residual_gain == 1 / 64


def test_weights_start_with_unit_gain_and_no_bias() -> None:
    torch.manual_seed(0)
    model = DVAE(DVAEConfig(n_hid=64))
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):
            assert not parameter.any()
        elif parameter.numel() > 10_000:
            fan_in = parameter[0].numel()
            assert float(parameter.detach().std()) == pytest.approx(fan_in**-0.5, rel=0.05)


def test_doubling_inside_a_block_equals_doubling_before_it() -> None:
    torch.manual_seed(0)
    late = ResBlock(16, 8, (1, 3, 3, 3), gain=0.5, upsample=True).double()
    early = ResBlock(16, 8, (1, 3, 3, 3), gain=0.5, upsample=False).double()
    early.load_state_dict(late.state_dict())
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(late(x), early(doubled))


def test_tokens_decode_as_their_one_hot_codes_do() -> None:
    torch.manual_seed(0)
    model = DVAE(SMALL).double()
    tokens = torch.randint(24, (2, 4, 4))
    one_hot = torch.nn.functional.one_hot(tokens, 24).permute(0, 3, 1, 2).double()
    torch.testing.assert_close(model.stats(tokens).float(), model.decoder(one_hot).float())


def test_pictures_become_a_grid_of_codes_and_come_back() -> None:
    torch.manual_seed(0)
    model = DVAE(SMALL)
    pixels = torch.rand(2, 3, 32, 32)
    tokens = model.encode(pixels)
    assert tokens.shape == (2, 4, 4)
    assert torch.equal(tokens, model.logits(pixels).argmax(dim=1))
    decoded = model.decode(tokens)
    assert decoded.shape == pixels.shape
    assert 0 <= float(decoded.detach().min()) <= float(decoded.detach().max()) <= 1


def test_logits_and_codebook_stay_in_fp32_under_autocast() -> None:
    model = DVAE(SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.logits(torch.rand(1, 3, 32, 32))
        codes = model.decoder.blocks[0](torch.rand(1, 24, 4, 4, dtype=torch.bfloat16))
        stats = model.decoder(torch.rand(1, 24, 4, 4))
    assert logits.dtype == codes.dtype == torch.float32
    assert stats.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (torch.rand(3, 32, 32), r"\(B, 3, H, W\)"),
        (torch.rand(1, 1, 32, 32), r"\(B, 3, H, W\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "float32"),
        (torch.rand(1, 3, 33, 32), "multiples of 8"),
    ],
)
def test_wrong_pixels_are_refused_in_words(pixels: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DVAE(SMALL).encode(pixels)


@pytest.mark.parametrize("tokens", [torch.tensor([[[24]]]), torch.tensor([[[-1]]])])
def test_codes_outside_the_vocabulary_are_refused(tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="tokens must be 0 to 23"):
        DVAE(SMALL).decode(tokens)


@pytest.mark.parametrize(
    "sizes", [{"image_size": 100}, {"n_hid": 6}, {"vocab_size": 1}, {"group_count": 0}]
)
def test_impossible_sizes_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(sizes))):
        DVAEConfig(**sizes)
