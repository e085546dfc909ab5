"""The prior's masks on a CUDA device: FlexAttention, which leaves out blocks that nobody sees.

In raster order a column's keys touch every block of 128; in the order of columns they touch half as
many. So the column kind's image tokens are transposed before the kernel and back after it, as in
the paper (figure 11).

Letters: B batch, T stream length, H heads, D head width, G the grid's side.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

SparseKind = Literal["row", "column", "conv"]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

SMALLEST_HEAD = 16  # the kernels refuse narrower ones (torch 2.13)
SHORTEST_STREAM = 128  # a block; below, torch takes a kernel for decoding


def is_suited(qkv: Tensor) -> bool:
    """Whether the kernels take it."""
    suited = qkv.shape[-1] >= SMALLEST_HEAD and qkv.shape[-2] >= SHORTEST_STREAM
    return qkv.device.type == "cuda" and suited


def block_mask(
    kind: SparseKind, text_len: int, grid: int, conv_kernel: int, device: torch.device
) -> BlockMask:
    """Of the whole stream, for `flexible_attention`."""
    length = text_len + grid * grid
    visible = mask_mod(kind, text_len, grid, conv_kernel)
    # Some other forward pass than inference may well be the next to use it.
    with torch.inference_mode(mode=False):
        return create_block_mask(visible, None, None, length, length, device=device)


def mask_mod(kind: SparseKind, text_len: int, grid: int, conv_kernel: int) -> MaskMod:
    """Which key a query sees, by place in the stream: in the order of columns for that kind."""
    radius = (conv_kernel - 1) // 2

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        behind = query - key
        if kind == "row":
            near = behind <= grid
        elif kind == "column":
            near = (query - text_len) // grid == (key - text_len) // grid
        else:
            rows_up = ((behind + grid // 2) // grid).clamp(0, radius)  # the nearest of the kernel's
            near = (behind - rows_up * grid).abs() <= radius
        return (behind >= 0) & (near | (key < text_len))

    return visible


def flexible_attention(
    qkv: Tensor, mask: BlockMask, *, grid: int, by_column: bool, attend: Callable[..., Any]
) -> Tensor:
    """(3, B, H, T, D) -> (B, H, T, D); `attend` is flex_attention, compiled or not."""
    if not by_column:
        y: Tensor = attend(*qkv, block_mask=mask)
        return y
    return _transposed(attend(*_transposed(qkv, grid), block_mask=mask), grid)


@functools.cache
def compiled() -> Callable[..., Any]:
    """flex_attention, compiled for each shape when it first comes."""
    return torch.compile(flex_attention, dynamic=False)


def _transposed(x: Tensor, grid: int) -> Tensor:  # (…, T, D): rows for columns, and back
    text, image = x.split((x.shape[-2] - grid * grid, grid * grid), dim=-2)
    image = image.unflatten(-2, (grid, grid)).transpose(-3, -2).flatten(-3, -2)
    return torch.cat((text, image), dim=-2)
