"""Attention that computes little more than its mask shows, as batched matrix products.

The image tokens are cut into blocks: the grid's rows, or its columns for the column kind. In every
mask of the paper the queries of a block see image keys of their own block and a few before it, a
window that moves with the block: a view of the keys, one behind another. So scores are made against
all text keys and the window's, beside each other: one softmax runs over both. With a 32×32 grid
that is 256 + 64 keys a query for rows, 256 + 32 for columns and 256 + 200 for an 11×11 convolution,
where a dense mask computes 1,280.

In 16 bits scores are rounded to 16 bits before the softmax, as in any attention that is written
out.

Letters: B batch, T stream length, H heads, D head width, S text slots, G blocks of G tokens each,
I = G², N = B · H or fewer of these, L keys of the window before a block, W = S + L + G keys of a
query.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SHARE_BYTES = 4 << 20  # of scores that are worked on at a time: they stay in the cache
ALIGNMENT = 8  # numbers: a row of scores that starts unaligned is slower


class Folding(NamedTuple):
    """How a mask folds into blocks."""

    text_len: int
    by_column: bool
    """Blocks are the grid's columns, not its rows."""
    bias: Tensor
    """(G, G, L + G): 0 where a block's query sees a key, -inf elsewhere; the keys are the L before
    the block, then its own."""

    @property
    def grid(self) -> int:
        return self.bias.shape[0]

    @property
    def lead(self) -> int:
        """L, the keys of the window before a block."""
        return self.bias.shape[-1] - self.grid


def fold_mask(image_mask: Tensor, text_len: int, *, by_column: bool) -> Folding:
    """The folding of a causal mask, bool (grid², grid²), of queries and keys in raster order."""
    grid = math.isqrt(len(image_mask))
    if by_column:
        blocks = image_mask.view(grid, grid, grid, grid)  # query row, column, key row, column
        image_mask = blocks.permute(1, 0, 3, 2).reshape(len(image_mask), -1)
    query, key = image_mask.nonzero().unbind(1)
    block, place = query // grid, query % grid
    behind = block * grid - key  # of the first token of the query's block
    if int(behind.min()) <= -grid:
        raise ValueError("image_mask must be causal from block to block, got one that is not")
    lead = math.ceil(max(0, int(behind.max())) / ALIGNMENT) * ALIGNMENT
    bias = torch.full((grid, grid, lead + grid), -math.inf)
    bias[block, place, lead - behind] = 0.0
    return Folding(text_len, by_column, bias)


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
            image = _to_image(qkv, folding)
            q, k, v = _own(image, folding)[0], image[1], image[2]
            for queries in (text[0], q):
                queries *= qkv.shape[-1] ** -0.5
            text_weights = _text_weights(text)
            y_text = text_weights @ text[2]
            weights = q.new_empty(*q.shape[:2], folding.text_len + folding.bias.shape[-1])
            y_image = torch.empty_like(q)
            for share in _shares(weights):
                scores = _against_keys(
                    q[share], text[1, share], _windows(k, share, folding), weights[share]
                )
                _blocks(scores, folding)[..., folding.text_len :].add_(folding.bias)
                torch.softmax(scores, dim=-1, out=scores)
                _mix(scores, text[2, share], _windows(v, share, folding), y_image[share])
            ctx.save_for_backward(text, image, text_weights, weights)
            ctx.folding, ctx.shape = folding, qkv.shape
            return _to_stream(y_text[None], y_image[None], qkv.shape[1:], folding)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        text, image, text_weights, weights = ctx.saved_tensors
        folding: Folding = ctx.folding
        by_text = gradient[..., : folding.text_len, :].flatten(0, 1).contiguous()
        by_image = _own(_to_image(gradient[None], folding), folding)[0]
        q, k, v = _own(image, folding)[0], image[1], image[2]
        d_text, d_image = torch.empty_like(text), torch.empty_like(image)
        d_own = _own(d_image, folding)

        scores = torch._softmax_backward_data(
            by_text @ text[2].mT, text_weights, -1, text_weights.dtype
        )
        torch.bmm(scores, text[1], out=d_text[0])
        torch.bmm(scores.mT, text[0], out=d_text[1])
        torch.bmm(text_weights.mT, by_text, out=d_text[2])

        shares = _shares(weights)
        room = torch.empty_like(weights[shares[0]])
        for share in shares:
            known = weights[share]
            scores = _against_keys(
                by_image[share], text[2, share], _windows(v, share, folding), room[: len(known)]
            )
            torch._softmax_backward_data(scores, known, -1, known.dtype, grad_input=scores)
            _mix(scores, text[1, share], _windows(k, share, folding), d_own[0, share])
            _spread(scores, q[share], d_text[1, share], d_image[1], share, folding)
            _spread(known, by_image[share], d_text[2, share], d_image[2], share, folding)
        for queries in (d_text[0], d_own[0]):
            queries *= gradient.shape[-1] ** -0.5  # those in `text` and `image` are scaled
        return _to_stream(d_text, d_own, ctx.shape[1:], folding), None


def _shares(weights: Tensor) -> list[slice]:  # (N, I, W)
    """Heads that are worked on together."""
    per_head = weights.shape[1] * weights.shape[2] * weights.element_size()
    share = max(1, SHARE_BYTES // per_head)
    heads = len(weights)
    return [slice(first, min(first + share, heads)) for first in range(0, heads, share)]


def _to_image(x: Tensor, folding: Folding) -> Tensor:  # (n, B, H, T, D) -> (n, L + N · I, D)
    """Blocks in a row, head after head, behind L zeros."""
    grid = folding.grid
    blocks = x[..., folding.text_len :, :].unflatten(-2, (grid, grid))
    if folding.by_column:
        blocks = blocks.transpose(-3, -2)
    image = x.new_empty(len(x), folding.lead + blocks[0, ..., 0].numel(), x.shape[-1])
    image[:, : folding.lead] = 0.0
    image[:, folding.lead :].view(blocks.shape).copy_(blocks)
    return image


def _own(image: Tensor, folding: Folding) -> Tensor:  # (n, L + N · I, D) -> (n, N, I, D)
    return image[:, folding.lead :].unflatten(1, (-1, folding.grid**2))


def _to_stream(
    text: Tensor, image: Tensor, shape: tuple[int, ...], folding: Folding
) -> Tensor:  # (n, N, S, D), (n, N, I, D) -> (n, B, H, T, D)
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


def _windows(image: Tensor, share: slice, folding: Folding) -> Tensor:
    """(L + all heads' I, D) -> (N · G, L + G, D), a view: the windows of a share's blocks.

    At a head's first blocks a window begins in another head, or in the zeros, which the bias hides.
    """
    return _strided(image, share, folding, start=0, length=folding.bias.shape[-1])


def _strided(image: Tensor, share: slice, folding: Folding, *, start: int, length: int) -> Tensor:
    """Of the window of every block, `length` tokens from `start` on."""
    grid, width = folding.grid, image.shape[-1]
    first = share.start * grid**2 + start
    return image.as_strided(
        ((share.stop - share.start) * grid, length, width),
        (grid * width, width, 1),
        image.storage_offset() + first * width,
    )


def _blocks(x: Tensor, folding: Folding) -> Tensor:  # (N, I, …) -> (N, G, G, …)
    return x.unflatten(1, (folding.grid, folding.grid))


def _per_block(x: Tensor, windows: Tensor) -> Tensor:  # (N, I, …) -> (N · G, G, …)
    return x.view(len(windows), -1, x.shape[-1])


def _against_keys(q: Tensor, text_k: Tensor, windows: Tensor, out: Tensor) -> Tensor:
    """Products (N, I, W) of (N, I, D) with text (N, S, D) and windows."""
    text_len = text_k.shape[1]
    torch.bmm(q, text_k.mT, out=out[..., :text_len])
    scores = _per_block(out, windows)[..., text_len:]
    torch.bmm(_per_block(q, windows), windows.mT, out=scores)
    return out


def _mix(weights: Tensor, text_v: Tensor, windows: Tensor, out: Tensor) -> None:
    """Sums (N, I, D) of values by weights (N, I, W)."""
    text_len = text_v.shape[1]
    torch.bmm(weights[..., :text_len], text_v, out=out)
    _per_block(out, windows).baddbmm_(_per_block(weights, windows)[..., text_len:], windows)


def _spread(
    weights: Tensor, q: Tensor, text_k: Tensor, image_k: Tensor, share: slice, folding: Folding
) -> None:
    """The transpose of `_mix`: (N, I, D) by weights (N, I, W) to the keys.

    Adds to what `text_k` (N, S, D) holds. `image_k` (L + all heads' I, D) is overwritten where it
    is the share's own, and added to before that. Windows overlap, so it goes block by block.
    """
    text_k.baddbmm_(weights[..., : folding.text_len].mT, q)
    queries = q.view(-1, folding.grid, q.shape[-1])
    local = _per_block(weights, queries)[..., folding.text_len :]
    end = folding.bias.shape[-1]
    while end > 0:
        start = max(0, end - folding.grid)
        keys = _strided(image_k, share, folding, start=start, length=end - start)
        is_own = start == folding.lead
        keys.baddbmm_(local[..., start:end].mT, queries, beta=0.0 if is_own else 1.0)
        end = start
