"""Which tokens of the prior see which: the paper's masks (figure 11), and attention under them.

The stream is `text_len` text slots (the start token and padding included), then `grid`² image
tokens in raster order. Text attends causally to text. An image token attends to every text slot
and, by the layer's kind, to image tokens: itself and earlier ones.

Letters: B batch, T stream length, H heads, D head width, C model width.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from models import flexible_attention
from models.linear import Linear
from models.sparse_attention import Folding, fold_mask, folded_attention

LayerKind = Literal["row", "column", "conv", "full"]


def layer_kinds(n_layers: int) -> tuple[LayerKind, ...]:
    """Row, column, row, row, repeating; convolution in the last layer only (paper, appendix B.1).

    With layers counted from 1, layer i is a column layer if (i - 2) mod 4 = 0.
    """
    kinds: list[LayerKind] = [
        "column" if (i - 2) % 4 == 0 else "row" for i in range(1, n_layers + 1)
    ]
    kinds[-1] = "conv"
    return tuple(kinds)


def image_mask(kind: LayerKind, grid: int, conv_kernel: int = 11) -> Tensor:
    """Bool (grid², grid²): True where image query i (a row) sees image key j (a column).

    row: i - grid … i, itself and the `grid` tokens before it, across the row's edge;
    column: the same column, earlier rows and itself;
    conv: offsets up to the kernel's radius, upwards and to both sides, restricted to the past. The
    arithmetic is on the raster index, so that it wraps at the row's edge as the row mask does;
    full: every earlier token and itself.
    """
    if kind not in get_args(LayerKind):
        raise ValueError(f"kind must be one of {get_args(LayerKind)}, got {kind!r}")
    if conv_kernel < 1 or conv_kernel % 2 == 0:
        raise ValueError(f"conv_kernel must be odd and positive, got {conv_kernel}")
    index = torch.arange(grid * grid)
    behind = index[:, None] - index[None, :]  # how far back in raster order the key lies
    causal = behind >= 0
    if kind == "full":
        return causal
    if kind == "row":
        return causal & (behind <= grid)
    if kind == "column":
        return causal & (behind % grid == 0)
    radius = (conv_kernel - 1) // 2
    mask = torch.zeros_like(causal)
    for rows_up in range(radius + 1):
        for columns in range(-radius, radius + 1):
            mask |= behind == rows_up * grid - columns
    return mask & causal


def stream_mask(kind: LayerKind, text_len: int, grid: int, conv_kernel: int = 11) -> Tensor:
    """Bool (T, T) of the whole stream, T = text_len + grid²."""
    total = text_len + grid * grid
    mask = torch.zeros(total, total, dtype=torch.bool)
    mask[:text_len, :text_len] = torch.ones(text_len, text_len, dtype=torch.bool).tril()
    mask[text_len:, :text_len] = True
    mask[text_len:, text_len:] = image_mask(kind, grid, conv_kernel)
    return mask


class MaskedAttention:
    """Softmax attention under the masks of a prior's layers, in the form that suits the device.

    On a CPU it is written out in blocks (`sparse_attention.py`), on a CUDA device it is
    FlexAttention (`flexible_attention.py`); dense causal attention is torch's own. The softmax runs
    over the text and the image keys together.
    """

    def __init__(self, text_len: int, grid: int, conv_kernel: int) -> None:
        self.text_len, self.grid, self.conv_kernel = text_len, grid, conv_kernel
        self._foldings: dict[tuple[LayerKind, torch.dtype, torch.device], Folding] = {}
        self._block_masks: dict[tuple[LayerKind, torch.device], BlockMask] = {}

    def __call__(self, kind: LayerKind, qkv: Tensor) -> Tensor:  # (3, B, H, T, D) -> (B, H, T, D)
        if kind == "full":
            # Text sees no image and images see all text: over the whole stream that is causal.
            q, k, v = qkv
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if flexible_attention.is_suited(qkv):
            return flexible_attention.flexible_attention(
                qkv,
                self._block_mask(kind, qkv.device),
                grid=self.grid,
                by_column=kind == "column",
                attend=flexible_attention.compiled(),
            )
        return folded_attention(qkv, self._folding(kind, qkv))

    def keys_of(self, kind: LayerKind) -> int:
        """Keys that a CPU makes scores of for an image token: all text, and a few blocks."""
        mask = image_mask(kind, self.grid, self.conv_kernel)
        folding = fold_mask(mask, self.text_len, by_column=kind == "column")
        return self.text_len + folding.bias.shape[-1]

    def _folding(self, kind: LayerKind, qkv: Tensor) -> Folding:
        """Made once a kind, precision and device."""
        key = kind, qkv.dtype, qkv.device
        if key not in self._foldings:
            mask = image_mask(kind, self.grid, self.conv_kernel)
            folding = fold_mask(mask, self.text_len, by_column=kind == "column")
            self._foldings[key] = folding._replace(bias=folding.bias.to(qkv))
        return self._foldings[key]

    def _block_mask(self, kind: flexible_attention.SparseKind, device: torch.device) -> BlockMask:
        """Made once a kind and device."""
        if (kind, device) not in self._block_masks:
            self._block_masks[kind, device] = flexible_attention.block_mask(
                kind, self.text_len, self.grid, self.conv_kernel, device
            )
        return self._block_masks[kind, device]


class SelfAttention(nn.Module):
    """The two linear layers around multi-head attention."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.c_attn = Linear(d_model, 3 * d_model)
        self.c_proj = Linear(d_model, d_model)

    def stack(self, x: Tensor) -> Tensor:  # (B, T, C) -> (3, B, H, T, D)
        """Queries, keys and values."""
        qkv: Tensor = self.c_attn(x).unflatten(-1, (3, self.n_heads, -1))
        return qkv.permute(2, 0, 3, 1, 4)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (B, T, C) -> 3 × (B, H, T, D)
        q, k, v = self.stack(x)
        return q, k, v

    def merge(self, y: Tensor) -> Tensor:  # (B, H, T, D) -> (B, T, C)
        out: Tensor = self.c_proj(y.transpose(1, 2).flatten(-2))
        return out
