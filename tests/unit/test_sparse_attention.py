"""Attention in blocks against dense masked attention: outputs, all gradients, and who sees whom."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from models.attention import LayerKind, MaskedAttention, image_mask, stream_mask
from models.flexible_attention import SparseKind, block_mask, flexible_attention, mask_mod
from models.sparse_attention import fold_mask, folded_attention

SPARSE: list[SparseKind] = ["row", "column", "conv"]
KINDS: list[LayerKind] = [*SPARSE, "full"]
# (text slots, grid, kernel): kernels wider than the grid and of one token, a grid of one.
SIZES = [(6, 4, 3), (64, 8, 5), (5, 3, 11), (7, 6, 1), (2, 1, 3), (9, 16, 11)]


def random_qkv(text_len: int, grid: int, dtype: torch.dtype, width: int = 10) -> Tensor:
    torch.manual_seed(0)
    shape = (3, 2, 3, text_len + grid * grid, width)
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def dense(qkv: Tensor, mask: Tensor) -> Tensor:
    q, k, v = qkv
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def error(mine: Tensor, wanted: Tensor) -> float:
    return ((mine.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 0.02)]
)
@pytest.mark.parametrize(("text_len", "grid", "kernel"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_dense_masked_attention(
    kind: LayerKind, text_len: int, grid: int, kernel: int, dtype: torch.dtype, largest: float
) -> None:
    qkv = random_qkv(text_len, grid, dtype)
    wide = qkv.detach().double().requires_grad_()
    y = MaskedAttention(text_len, grid, kernel)(kind, qkv)
    wanted = dense(wide, stream_mask(kind, text_len, grid, kernel))
    assert y.dtype == dtype
    assert error(y, wanted) <= largest
    gradient = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, qkv, gradient)
    (other,) = torch.autograd.grad(wanted, wide, gradient.double())
    for mine, reference in zip(got, other, strict=True):  # of the queries, the keys, the values
        assert error(mine, reference) <= largest


@pytest.mark.parametrize("kind", SPARSE)
def test_the_paper_s_stream_agrees_with_dense_attention(kind: SparseKind) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(3, 1, 1, 1280, 64, requires_grad=True)
    y = MaskedAttention(256, 32, 11)(kind, qkv)
    wanted = dense(qkv, stream_mask(kind, 256, 32, 11))
    gradient = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, qkv, gradient)
    (other,) = torch.autograd.grad(wanted, qkv, gradient)
    assert error(y, wanted) <= 1e-5
    for mine, reference in zip(got, other, strict=True):
        assert error(mine, reference) <= 1e-5


@pytest.mark.parametrize(("kind", "keys"), [("row", 64), ("column", 32), ("conv", 224)])
def test_an_image_token_of_the_paper_is_scored_against_few_image_keys(
    kind: SparseKind, keys: int
) -> None:
    folding = fold_mask(image_mask(kind, 32, 11), 256, by_column=kind == "column")
    assert folding.bias.shape == (32, 32, keys)
    visible = image_mask(kind, 32, 11).sum()
    assert (folding.bias == 0).sum() == visible


@pytest.mark.parametrize("kind", SPARSE)
def test_the_gradient_is_exact(kind: SparseKind) -> None:
    qkv = random_qkv(3, 3, torch.float64, width=4)
    attend = MaskedAttention(3, 3, 3)
    assert torch.autograd.gradcheck(lambda x: attend(kind, x), (qkv,))


@pytest.mark.parametrize("kind", SPARSE)
def test_a_head_s_values_do_not_leak_into_the_next_one(kind: SparseKind) -> None:
    """The first blocks of a head lie behind the last ones of another in memory."""
    qkv = random_qkv(4, 4, torch.float64).detach()
    attend = MaskedAttention(4, 4, 3)
    before = attend(kind, qkv)
    qkv[:, 0, 1] += 1.0
    changed = (attend(kind, qkv) != before).flatten(2).any(dim=2)
    assert changed.tolist() == [[False, True, False], [False, False, False]]


def test_a_mask_that_shows_the_future_is_refused() -> None:
    with pytest.raises(ValueError, match="image_mask must be causal"):
        fold_mask(torch.ones(16, 16, dtype=torch.bool), 4, by_column=False)


def test_autocast_leaves_the_precision_of_the_input_alone() -> None:
    qkv = random_qkv(6, 4, torch.float32)
    attend = MaskedAttention(6, 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = attend("row", qkv)
    assert torch.equal(y, attend("row", qkv))


def test_tables_made_in_inference_serve_a_training_afterwards() -> None:
    qkv = random_qkv(6, 4, torch.float32)
    attend = MaskedAttention(6, 4, 3)
    with torch.inference_mode():
        before = attend("conv", qkv)
    y = attend("conv", qkv)
    y.sum().backward()
    assert torch.equal(y, before)
    assert qkv.grad is not None


@pytest.mark.parametrize(("text_len", "grid", "kernel"), [*SIZES, (256, 32, 11)])
@pytest.mark.parametrize("kind", SPARSE)
def test_a_block_mask_shows_what_the_mask_shows(
    kind: SparseKind, text_len: int, grid: int, kernel: int
) -> None:
    place = torch.arange(text_len + grid * grid)
    visible: Any = mask_mod(kind, text_len, grid, kernel)
    shown = visible(None, None, place[:, None], place[None, :])
    order = place.clone()  # the raster index of each place
    if kind == "column":
        order[text_len:] = text_len + torch.arange(grid * grid).view(grid, grid).t().flatten()
    assert torch.equal(shown, stream_mask(kind, text_len, grid, kernel)[order][:, order])


@pytest.mark.parametrize("kind", SPARSE)
def test_flexible_attention_gives_what_folded_attention_gives(kind: SparseKind) -> None:
    """Without its compiled kernels, which only a GPU runs forwards and backwards (torch 2.13)."""
    qkv = random_qkv(30, 12, torch.float32, width=16).detach()
    by_column = kind == "column"
    folding = fold_mask(image_mask(kind, 12, 5), 30, by_column=by_column)
    mask = block_mask(kind, 30, 12, 5, torch.device("cpu"))
    y = flexible_attention(qkv, mask, grid=12, by_column=by_column, attend=flex_attention)
    assert error(y, folded_attention(qkv, folding).double()) <= 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SPARSE)
def test_on_a_gpu_outputs_and_gradients_are_those_on_a_cpu(
    kind: SparseKind, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(3, 2, 2, 96 + 256, 64, dtype=torch.float64, requires_grad=True)
    there = qkv.detach().to("cuda", dtype).requires_grad_()
    attend = MaskedAttention(96, 16, 5)
    y, wanted = attend(kind, there), attend(kind, qkv)
    y.float().square().sum().backward()
    wanted.square().sum().backward()
    assert qkv.grad is not None
    assert there.grad is not None
    largest = 1e-4 if dtype == torch.float32 else 0.03
    assert error(y.cpu(), wanted) <= largest
    assert error(there.grad.cpu(), qkv.grad) <= largest
