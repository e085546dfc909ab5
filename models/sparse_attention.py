"""Attention that computes little more than its mask shows, as batched matrix products.

The image tokens are cut into blocks: the grid's rows, or its columns for the column kind. In every
mask of the paper the queries of a block see image keys in a few blocks only, their own and those
just before it. So scores are made against all text keys and these blocks' keys, beside each other:
one softmax runs over both. With a 32×32 grid that is 256 + 64 keys a query for rows, 256 + 32 for
columns and 256 + 224 for an 11×11 convolution, where a dense mask computes 1,280.

In 16 bits scores are rounded to 16 bits before the softmax, as in any attention that is written
out.

Letters: B batch, T stream length, H heads, D head width, S text slots, G blocks of G tokens each,
N = B · H, J blocks that a query sees, W = S + J · G keys of a query.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Folding(NamedTuple):
    """How a mask folds into blocks."""

    text_len: int
    by_column: bool
    """Blocks are the grid's columns, not its rows."""
    bias: Tensor
    """(G, G, J · G): 0 where a block's query sees a key, -inf elsewhere; the keys are those of the
    J - 1 blocks before it, nearest last, then its own."""

    @property
    def grid(self) -> int:
        return self.bias.shape[0]

    @property
    def n_keys(self) -> int:
        """W: text and image keys of a query."""
        return self.text_len + self.bias.shape[-1]

    @property
    def n_back(self) -> int:
        """Blocks before its own that a query sees."""
        return self.bias.shape[-1] // self.grid - 1


def fold_mask(image_mask: Tensor, text_len: int, *, by_column: bool) -> Folding:
    """The folding of a causal mask, bool (grid², grid²), of queries and keys in raster order."""
    grid = math.isqrt(len(image_mask))
    blocks = image_mask.view(grid, grid, grid, grid)  # query row, column, key row, column
    if by_column:
        blocks = blocks.permute(1, 0, 3, 2)
    touched = blocks.any(3).any(1).nonzero()  # (query block, key block)
    behind = touched[:, 0] - touched[:, 1]
    if int(behind.min()) < 0:
        raise ValueError("image_mask must be causal from block to block, got one that is not")
    n_back = int(behind.max())
    bias = torch.full((grid, grid, n_back + 1, grid), -math.inf)
    for back in range(n_back + 1):
        for block in range(back, grid):
            bias[block, :, n_back - back][blocks[block, :, block - back]] = 0.0
    return Folding(text_len, by_column, bias.flatten(2))


def folded_attention(qkv: Tensor, folding: Folding) -> Tensor:
    """(3, B, H, T, D) -> (B, H, T, D): text causal to text, images to all text and by the mask."""
    y: Tensor = _FoldedAttention.apply(qkv, folding)
    return y


class _FoldedAttention(torch.autograd.Function):
    """The probabilities are kept for the backward pass: W of them a query, not T."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, folding: Folding) -> Tensor:
        with torch.autocast(qkv.device.type, enabled=False):
            text = qkv[..., : folding.text_len, :].flatten(1, 2).contiguous()
            image = _to_blocks(qkv, folding)
            for part in (text, image):
                part[0] *= qkv.shape[-1] ** -0.5
            text_weights = _text_weights(text)
            weights = _image_weights(text, image, folding)
            y_text = text_weights @ text[2]
            y_image = _mix(weights, text[2], image[2], folding)
            ctx.save_for_backward(text, image, text_weights, weights)
            ctx.folding, ctx.shape = folding, qkv.shape
            return _to_stream(y_text[None], y_image[None], qkv.shape[1:], folding)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        text, image, text_weights, weights = ctx.saved_tensors
        folding: Folding = ctx.folding
        by_text = gradient[..., : folding.text_len, :].flatten(0, 1).contiguous()
        by_image = _to_blocks(gradient[None], folding)[0]
        d_text, d_image = torch.empty_like(text), torch.empty_like(image)

        scores = torch._softmax_backward_data(
            by_text @ text[2].mT, text_weights, -1, text_weights.dtype
        )
        torch.bmm(scores, text[1], out=d_text[0])
        torch.bmm(scores.mT, text[0], out=d_text[1])
        torch.bmm(text_weights.mT, by_text, out=d_text[2])

        scores = _against_keys(by_image, text[2], image[2], folding)
        torch._softmax_backward_data(scores, weights, -1, weights.dtype, grad_input=scores)
        d_image[0] = _mix(scores, text[1], image[1], folding)
        _spread(scores, image[0], d_text[1], d_image[1], folding)
        _spread(weights, by_image, d_text[2], d_image[2], folding)
        for part in (d_text, d_image):
            part[0] *= gradient.shape[-1] ** -0.5  # the queries in `text` and `image` are scaled
        return _to_stream(d_text, d_image, ctx.shape[1:], folding), None


def _to_blocks(x: Tensor, folding: Folding) -> Tensor:  # (n, B, H, T, D) -> (n, N · G, G, D)
    grid = folding.grid
    image = x[..., folding.text_len :, :].unflatten(-2, (grid, grid))
    if folding.by_column:
        image = image.transpose(-3, -2)
    return image.contiguous().view(len(x), -1, grid, x.shape[-1])


def _to_stream(
    text: Tensor, image: Tensor, shape: tuple[int, ...], folding: Folding
) -> Tensor:  # (n, N, S, D), (n, N · G, G, D) -> (n, B, H, T, D)
    """Stored as (B, T, n, H, D), so that the heads side by side are a view."""
    batch, heads, length, width = shape
    stream = text.new_empty(batch, length, len(text), heads, width).permute(2, 0, 3, 1, 4)
    stream[..., : folding.text_len, :] = text.unflatten(1, (batch, heads))
    image = image.view(len(text), batch, heads, folding.grid, folding.grid, width)
    if folding.by_column:
        image = image.transpose(-3, -2)
    stream[..., folding.text_len :, :].unflatten(-2, (folding.grid, folding.grid)).copy_(image)
    return stream


def _text_weights(text: Tensor) -> Tensor:  # (3, N, S, D) -> (N, S, S)
    length = text.shape[2]
    hidden = torch.full((length, length), -math.inf, dtype=text.dtype, device=text.device).triu(1)
    return torch.softmax((text[0] @ text[1].mT).add_(hidden), dim=-1)


def _image_weights(text: Tensor, image: Tensor, folding: Folding) -> Tensor:
    """(3, N, S, D), (3, N · G, G, D) -> (N · G, G, W): the text keys' weights, then the blocks'."""
    scores = _against_keys(image[0], text[1], image[1], folding)
    per_head = scores.view(text.shape[1], folding.grid, folding.grid, -1)
    per_head[..., folding.text_len :].add_(folding.bias)
    return torch.softmax(scores, dim=-1, out=scores)


def _against_keys(q: Tensor, text_k: Tensor, image_k: Tensor, folding: Folding) -> Tensor:
    """Products (N · G, G, W) of blocks (N · G, G, D) with text (N, S, D) and blocks' keys.

    The block `back` before another is that many before it in a row of all heads' blocks. At a
    head's first blocks it is another head's, which the bias hides; before the very first there is
    none.
    """
    n_blocks, grid, width = q.shape
    by_head = q.view(len(text_k), -1, width)
    if _needs_whole_rows(q):
        out = torch.bmm(by_head, _padded(text_k, folding).mT).view(n_blocks, grid, -1)
    else:
        out = q.new_empty(n_blocks, grid, folding.n_keys)
        of_text = out.view(len(text_k), -1, folding.n_keys)[..., : folding.text_len]
        torch.bmm(by_head, text_k.mT, out=of_text)
    for back in range(folding.n_back + 1):
        keys = _keys_of(back, folding)
        out[:back, :, keys] = 0.0
        out[back:, :, keys] = q[back:] @ image_k[: n_blocks - back].mT
    return out


def _mix(weights: Tensor, text_v: Tensor, image_v: Tensor, folding: Folding) -> Tensor:
    """Sums (N · G, G, D) of values by weights (N · G, G, W)."""
    n_blocks, grid, _ = weights.shape
    by_head = weights.view(len(text_v), -1, folding.n_keys)
    if _needs_whole_rows(weights):
        out = by_head @ _padded(text_v, folding)
    else:
        out = by_head[..., : folding.text_len] @ text_v
    out = out.view(n_blocks, grid, -1)
    for back in range(folding.n_back + 1):
        out[back:].baddbmm_(weights[back:, :, _keys_of(back, folding)], image_v[: n_blocks - back])
    return out


def _spread(weights: Tensor, q: Tensor, text_k: Tensor, image_k: Tensor, folding: Folding) -> None:
    """The transpose of `_mix`: blocks (N · G, G, D) by weights to the keys.

    Adds to what `text_k` (N, S, D) holds, and overwrites `image_k` (N · G, G, D).
    """
    n_blocks, _, width = q.shape
    by_head = weights.view(len(text_k), -1, folding.n_keys).mT
    if _needs_whole_rows(weights):
        text_k += (by_head @ q.view(len(text_k), -1, width))[:, : folding.text_len]
    else:
        text_k.baddbmm_(by_head[:, : folding.text_len], q.view(len(text_k), -1, width))
    torch.bmm(weights[:, :, _keys_of(0, folding)].mT, q, out=image_k)
    for back in range(1, folding.n_back + 1):
        image_k[: n_blocks - back].baddbmm_(weights[back:, :, _keys_of(back, folding)].mT, q[back:])


def _needs_whole_rows(x: Tensor) -> bool:
    """Whether torch copies a part of a matrix's columns before it multiplies: in 16 bits on a CPU.

    To multiply whole rows, the blocks' keys against zeros, takes less time than these copies.
    """
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


def _padded(text: Tensor, folding: Folding) -> Tensor:  # (N, S, D) -> (N, W, D)
    return F.pad(text, (0, 0, 0, folding.n_keys - folding.text_len))


def _keys_of(back: int, folding: Folding) -> slice:
    """Where among the W keys those of the block `back` before the query's are."""
    start = folding.text_len + (folding.n_back - back) * folding.grid
    return slice(start, start + folding.grid)
