"""Keys and values of a static batch whose rows are at positions of their own.

`caches.py` keeps the candidates of a prompt together and their text once. Here every row has its
own text, so that any row can be given to anybody at any time. All products are of one row each:
what a row gets does not depend on how many others there are.

Letters: P prompts, B rows, A of them in use (the first ones), T text slots, n image tokens of a
prefix, H heads, D head width, S slots that a step reads, C model width, K image codes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import LayerKind
from pipelines.sampling.caches import Layout, image_layout
from pipelines.sampling.decoder import CachedDecoder
from pipelines.sampling.packing import LEAST_ROWS, AttentionWeights, StepWeights


class Prefix(NamedTuple):
    """A prompt and a picture's first tokens, run through the prior."""

    kv: list[Tensor]  # (2, H, T + n, D) an attention layer
    logits: Tensor  # (K,) of image token n


class RowMoment(NamedTuple):
    """What one step needs of a layout; the same for all layers that have it."""

    places: Tensor  # (A · H,) int64: where the new keys go, counted through all rows and heads
    mask: Tensor  # (A · H, 1, T + S), added to the scores
    slabs: Tensor | None  # (A · H,) int64: the slab that each reads, counted in the same way


class RowTimetable:
    """The moments of all positions of a layout."""

    def __init__(self, layout: Layout, weights: StepWeights, rows: int) -> None:
        device, text_len = weights.device, weights.config.text_len
        hidden = torch.cat((layout.hidden.new_zeros(len(layout.mask), text_len), layout.hidden), 1)
        mask = torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))
        self._masks = mask[:, None].to(device=device, dtype=weights.cache_dtype)
        self._places = layout.places.to(device)
        self._slabs = None if layout.slabs == 1 else self._places // layout.ring
        # With one slab the ring follows the text in the same memory.
        start = text_len if layout.slabs == 1 else 0
        each = torch.arange(rows * weights.config.n_heads, device=device)
        self._first_places = each * (start + layout.slabs * layout.ring) + start
        self._first_slabs = each * layout.slabs

    def at(self, positions: Tensor) -> RowMoment:  # (A · H,) int64
        """The moment at which each head of each row is at its position."""
        count, slabs = len(positions), self._slabs
        return RowMoment(
            places=self._places.index_select(0, positions) + self._first_places[:count],
            mask=self._masks.index_select(0, positions),
            slabs=None
            if slabs is None
            else slabs.index_select(0, positions) + self._first_slabs[:count],
        )


class RowCache:
    """Keys and values of one layer, of all rows."""

    def __init__(self, layout: Layout, weights: StepWeights, rows: int) -> None:
        config, self.layout = weights.config, layout
        self.heads, self.text_len, width = config.n_heads, config.text_len, config.head_dim
        self.scale = width**-0.5

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=weights.cache_dtype, device=weights.device)

        # The text, then the ring; of a layout with slabs, a copy of the slab that is read.
        self.kv = zeros(2, rows * self.heads, self.text_len + layout.ring, width)
        one = layout.slabs == 1
        self.slabs = None if one else zeros(2, rows * self.heads * layout.slabs, layout.ring, width)

    def load(self, row: int, kv: Tensor) -> None:  # (2, H, T + n, D)
        """Take over a prefix; whatever the row held is gone."""
        self._text(row).copy_(kv[:, :, : self.text_len])
        # Zeros, because a slot that is not written yet counts 0 times what is in it.
        written = self._written(row).zero_()
        held = self.layout.held(kv.shape[2] - self.text_len)
        places = self.layout.places[held].to(kv.device)
        written[:, :, places] = kv[:, :, self.text_len + held.to(kv.device)].to(written.dtype)

    def move(self, source: int, target: int) -> None:
        """Let one row have what another has."""
        self._text(target).copy_(self._text(source))
        self._written(target).copy_(self._written(source))

    def attend(self, qkv: Tensor, moment: RowMoment) -> Tensor:  # (3, A · H, D) -> (A · H, 1, D)
        """Attention of one new position of each row in use."""
        count, ring = qkv.shape[1], self.kv if self.slabs is None else self.slabs
        ring.flatten(1, 2).index_copy_(1, moment.places, qkv[1:])
        if self.slabs is not None:
            assert moment.slabs is not None
            self.kv[:, :count, self.text_len :] = self.slabs.index_select(1, moment.slabs)
        keys, values = self.kv[:, :count]
        q = qkv[0][:, None]
        scores = torch.baddbmm(moment.mask, q, keys.transpose(1, 2), alpha=self.scale)
        return torch.bmm(scores.softmax(dim=-1), values)

    def _text(self, row: int) -> Tensor:
        return self._of(self.kv, row)[:, :, : self.text_len]

    def _written(self, row: int) -> Tensor:  # (2, H, slots, D)
        if self.slabs is None:
            return self._of(self.kv, row)[:, :, self.text_len :]
        slots = self.layout.slabs * self.layout.ring
        return self._of(self.slabs.view(2, -1, slots, self.kv.shape[3]), row)

    def _of(self, kv: Tensor, row: int) -> Tensor:
        return kv[:, row * self.heads : (row + 1) * self.heads]


class RowDecoder:
    """Gives the logits of each row's next image token."""

    def __init__(self, weights: StepWeights, rows: int) -> None:
        self.weights = weights
        self.prompts = CachedDecoder(weights, 1)
        layouts: dict[LayerKind, Layout] = {
            kind: image_layout(kind, weights.config.grid, weights.config.conv_kernel)
            for kind in weights.kinds
        }
        self._tables = {kind: RowTimetable(layouts[kind], weights, rows) for kind in layouts}
        self._caches = [RowCache(layouts[kind], weights, rows) for kind in weights.kinds]
        self._embedding = weights.prior.image_embedding.weight.detach()

    @torch.inference_mode()
    def prefixes(self, text_tokens: Tensor, image_tokens: Tensor) -> list[Prefix]:
        """Run prompts (P, T) and their pictures' first tokens (P, n)."""
        x, kept = self.prompts.embed(text_tokens, image_tokens), []
        for passed in self.prompts.stack.walk(x, text_tokens.shape[1]):
            x = passed.x
            if passed.kept is not None:
                kept.append(passed.kept[1].to(self.weights.cache_dtype))  # (2, P, H, T + n, D)
        # Padded, so that one prompt's logits are what they are among others.
        missing = max(0, LEAST_ROWS - len(x))
        logits = self.prompts.score(F.pad(x[:, -1], (0, 0, 0, missing)))
        return [Prefix([kv[:, prompt] for kv in kept], logits[prompt]) for prompt in range(len(x))]

    @torch.inference_mode()
    def load(self, row: int, prefix: Prefix) -> None:
        """Begin a picture in a row."""
        for cache, kv in zip(self._caches, prefix.kv, strict=True):
            cache.load(row, kv)

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Go on in another row."""
        for cache in self._caches:
            cache.move(source, target)

    @torch.inference_mode()
    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:  # 2 × (A,) -> (A, K)
        """Add each row's token at its position; the logits of the next one."""
        weights, caches = self.weights, iter(self._caches)
        rows, heads = len(tokens), weights.config.n_heads
        each = positions.repeat_interleave(heads)
        moments = {kind: table.at(each) for kind, table in self._tables.items()}
        x = self._embedding.index_select(0, tokens)
        x = x + weights.image_position.index_select(0, positions)
        for block in weights.blocks:
            normed = block.norm(x)
            if isinstance(block, AttentionWeights):
                qkv = block.qkv(normed).view(rows, 3, heads, -1).transpose(0, 1)
                qkv = qkv.to(weights.cache_dtype).reshape(3, rows * heads, -1)
                y = next(caches).attend(qkv, moments[block.kind])
                x = block.out.add(y.view(rows, -1).to(weights.dtype), x)
            else:
                x = block.out.add(block.fc.gelu(normed), x)
        return self.prompts.score(x)
