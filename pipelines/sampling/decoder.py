"""The prior, one token at a time: what a step needs of the past is kept, not computed again.

A prompt is run through the prior once; all its candidates share the keys and values of its text.
Then the candidates of all prompts advance together, one token a step, each layer attending to what
its cache holds.

Letters: P prompts, N candidates a prompt, T text slots, n tokens of a prefix, C model width, K
image codes, V text ids.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import LayerKind
from pipelines.sampling.caches import (
    Heads,
    LayerCache,
    Layout,
    Moment,
    Timetable,
    image_layout,
    text_layout,
)
from pipelines.sampling.graphs import GraphedStep
from pipelines.sampling.packing import AttentionWeights, MLPWeights, StepWeights

At = Callable[[Timetable], Moment]


class Passed(NamedTuple):
    """What came out of one resblock of a prefix."""

    where: str
    x: Tensor  # (P, n, C)
    kept: tuple[Layout, Tensor] | None  # of an attention resblock, with keys and values


class LayerStack:
    """All resblocks with their caches: a whole prefix first, then one row a candidate."""

    def __init__(
        self, weights: StepWeights, layouts: Mapping[LayerKind, Layout], candidates: int
    ) -> None:
        self.weights, self.layouts, self.candidates = weights, layouts, candidates
        self._tables = {
            kind: Timetable(layout, weights.cache_dtype, weights.device)
            for kind, layout in layouts.items()
        }
        self._caches: list[LayerCache] = []
        self._heads: list[Heads] = []  # one, for all layers, once the prompts are known

    def fill(self, x: Tensor, text_len: int) -> Tensor:  # (P, n, C) -> (P, C)
        """Run a prefix and keep its keys and values: of the first `text_len` once a prompt."""
        self._caches, self._heads = [], []
        for passed in self.walk(x, text_len):
            x = passed.x
            if passed.kept is None:
                continue
            layout, kv = passed.kept
            k, v = kv.to(self.weights.cache_dtype)
            cache = LayerCache(layout, k[:, :, :text_len], v[:, :, :text_len], self.candidates)
            if x.shape[1] > text_len:
                cache.prime(k[:, :, text_len:], v[:, :, text_len:])
            self._caches.append(cache)
            self._heads = self._heads or [Heads(self.candidates, k, self.weights.dtype)]
        return x[:, -1]

    def walk(self, x: Tensor, text_len: int) -> Iterator[Passed]:  # x: (P, n, C)
        """One resblock after the other over a prefix of text and image tokens."""
        heads = self.weights.config.n_heads
        prompts, length, width = x.shape
        x = x.flatten(0, 1)
        for number, block in enumerate(self.weights.blocks):
            layer, normed, kept = number // 2 + 1, block.norm(x), None
            if isinstance(block, MLPWeights):
                where = f"the MLP of layer {layer}"
                x = block.out.add(block.fc.gelu(normed), x)
            else:
                where = f"the {block.kind} attention of layer {layer}"
                qkv = block.qkv(normed).view(prompts, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
                layout = self.layouts[block.kind]
                mask = prefix_mask(layout, text_len, length).to(x.device)
                y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=mask)
                x = block.out.add(y.transpose(1, 2).reshape(prompts * length, width), x)
                kept = layout, qkv[1:]  # (2, P, H, n, D)
            yield Passed(where, x.view(prompts, length, width), kept)

    def step(self, x: Tensor, at: At) -> Tensor:  # (P · N, C) -> (P · N, C)
        """One row a candidate, at the moment that `at` picks from each timetable."""
        moments = {kind: at(table) for kind, table in self._tables.items()}
        (heads,), caches = self._heads, iter(self._caches)
        for block in self.weights.blocks:
            normed = block.norm(x)
            if isinstance(block, AttentionWeights):
                heads.split(block.qkv(normed))
                y = heads.merge(next(caches).attend(heads, moments[block.kind]))
                x = block.out.add(y, x)
            else:
                x = block.out.add(block.fc.gelu(normed), x)
        return x


class CachedDecoder:
    """Gives the logits of the next image token, step by step, for all candidates of all prompts."""

    def __init__(self, weights: StepWeights, candidates: int) -> None:
        self.weights, self.candidates = weights, candidates
        config = weights.config
        layouts = {k: image_layout(k, config.grid, config.conv_kernel) for k in weights.kinds}
        self.stack = LayerStack(weights, layouts, candidates)
        self._positions = weights.image_position.unbind(0)
        self._embedding = weights.prior.image_embedding.weight.detach()
        self._graph: GraphedStep | None = None

    @torch.inference_mode()
    def prefill(self, text_tokens: Tensor, image_tokens: Tensor) -> Tensor:
        """Run the prompts (P, T) and the pictures' first tokens (P, n); (P · N, K) of token n."""
        self._graph = None  # it knows the caches of its own prompts only
        x = self.stack.fill(self.embed(text_tokens, image_tokens), text_tokens.shape[1])
        return self.score(x).repeat_interleave(self.candidates, dim=0)

    @torch.inference_mode()
    def step(self, tokens: Tensor, position: int) -> Tensor:  # (P · N,) -> (P · N, K)
        """Add the image tokens of a position; the logits of the next one."""
        if tokens.is_cuda:
            self._graph = self._graph or GraphedStep(self.step_anywhere, tokens, position)
            return self._graph(tokens, position)
        x = self._embedding.index_select(0, tokens) + self._positions[position]
        return self.score(self.stack.step(x, lambda table: table.at(position)))

    @torch.inference_mode()
    def step_anywhere(self, tokens: Tensor, position: Tensor) -> Tensor:
        """`step` with the position (1,) on the device: no shape and no address depends on it."""
        place = self.weights.image_position.index_select(0, position)
        x = self._embedding.index_select(0, tokens) + place
        return self.score(self.stack.step(x, lambda table: table.at_tensor(position)))

    def embed(self, text_tokens: Tensor, image_tokens: Tensor) -> Tensor:  # -> (P, T + n, C)
        prior = self.weights.prior
        text, image = prior.embed_text(text_tokens), prior.embed_image(image_tokens)
        return torch.cat((text, image), dim=1)

    def score(self, x: Tensor) -> Tensor:  # (B, C) -> (B, K)
        return self.weights.image_head(self.weights.norm(x))


class CaptionDecoder:
    """Gives the logits of the next text token, slot by slot, for all candidates of one caption."""

    def __init__(self, weights: StepWeights, candidates: int, length: int) -> None:
        """`length` is how many slots are given, the start token's included."""
        self.weights, self.candidates, self.length = weights, candidates, length
        layout = text_layout(weights.config.text_len - length)
        self.stack = LayerStack(weights, dict.fromkeys(weights.kinds, layout), candidates)

    @torch.inference_mode()
    def prefill(self, text_tokens: Tensor) -> Tensor:  # (1, T) -> (N, V)
        """Run the slots that are given; the logits of the one after them."""
        x = self.stack.fill(self.embed(text_tokens, self.length), self.length)
        return self.score(x).expand(self.candidates, -1)

    @torch.inference_mode()
    def step(self, text_tokens: Tensor, slot: int) -> Tensor:  # (N, T) -> (N, V)
        """Add the tokens of a slot; the logits of the next one."""
        x = self.weights.prior.embed_text(text_tokens)[:, slot]
        return self.score(self.stack.step(x, lambda table: table.at(slot - self.length)))

    def embed(self, text_tokens: Tensor, length: int) -> Tensor:  # (B, T) -> (B, length, C)
        return self.weights.prior.embed_text(text_tokens)[:, :length]

    def score(self, x: Tensor) -> Tensor:
        return self.weights.text_head(self.weights.norm(x))


def prefix_mask(layout: Layout, text_len: int, length: int) -> Tensor:
    """Bool (n, n): causal text, then positions that see the text and what their layout allows."""
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    rest = length - text_len
    mask[text_len:, text_len:] = layout.mask[:rest, :rest]
    return mask
