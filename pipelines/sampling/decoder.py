"""The prior, one image token at a time: what a step needs of the past is kept, not computed again.

A prompt is run through the prior once; all its candidates share the keys and values of its text.
Then the candidates of all prompts advance together, one image token a step, each layer attending to
the cached keys that its mask lets it see.

Letters: P prompts, N candidates a prompt, T text slots, H heads, D head width, L image tokens that
are visible, K image codes.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import LayerKind, image_mask
from models.prior import AttentionResblock, Prior


class CachedDecoder:
    """Gives the logits of the next image token, step by step, for all candidates of all prompts."""

    def __init__(self, prior: Prior, candidates: int) -> None:
        self.prior, self.candidates = prior, candidates
        self._caches: list[KeyValueCache] = []

    @torch.inference_mode()
    def prefill(self, text_tokens: Tensor) -> Tensor:  # (P, T) -> (P · N, K)
        """Run the prompts; the logits of image token 0."""
        prior = self.prior
        length = prior.config.image_len
        prior.check_tokens(text_tokens, text_tokens.new_zeros(1, length, dtype=torch.int64))
        self._caches = []
        x = prior.embed_text(text_tokens)
        for resblock in prior.resblocks:
            if isinstance(resblock, AttentionResblock):
                q, k, v = resblock.attn.project(resblock.enter(x))
                # Text attends causally to text in every layer, whatever its kind.
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                x = resblock.leave(x, resblock.attn.merge(y))
                self._caches.append(KeyValueCache(resblock.kind, prior, k, v, self.candidates))
            else:
                x = resblock(x)
        logits = prior.score_image(prior.ln_final(x[:, -1]))
        return logits.repeat_interleave(self.candidates, dim=0)

    @torch.inference_mode()
    def step(self, tokens: Tensor, position: int) -> Tensor:  # (P · N,) -> (P · N, K)
        """Add the image tokens of a position; the logits of the next one."""
        prior = self.prior
        x = prior.embed_image(tokens[:, None], start=position)
        caches = iter(self._caches)
        for resblock in prior.resblocks:
            if isinstance(resblock, AttentionResblock):
                q, k, v = resblock.attn.project(resblock.enter(x))
                y = next(caches).attend(q, k, v, position)
                x = resblock.leave(x, resblock.attn.merge(y))
            else:
                x = resblock(x)
        return prior.score_image(prior.ln_final(x[:, 0]))


class KeyValueCache:
    """Keys and values of one layer: of the text once a prompt, of the image once a candidate."""

    def __init__(
        self, kind: LayerKind, prior: Prior, text_k: Tensor, text_v: Tensor, candidates: int
    ) -> None:
        config = prior.config
        self.text_k, self.text_v = text_k, text_v  # (P, H, T, D)
        prompts, heads, _, width = text_k.shape
        shape = (prompts, heads, candidates, config.image_len, width)
        self.image_k, self.image_v = text_k.new_empty(shape), text_v.new_empty(shape)
        self.visible = visible_positions(kind, config.grid, config.conv_kernel, text_k.device)
        self.scale = width**-0.5

    def attend(self, q: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:
        """Attention of one new image token a candidate: (B, H, 1, D) each -> (B, H, 1, D)."""
        q, k, v = map(self._by_prompt, (q, k, v))  # (P, H, N, D)
        self.image_k[:, :, :, position] = k
        self.image_v[:, :, :, position] = v
        visible = self.visible[position]
        image_k = self.image_k[:, :, :, visible]  # (P, H, N, L, D)
        image_v = self.image_v[:, :, :, visible]
        q = q * self.scale
        text_scores = q @ self.text_k.transpose(-1, -2)  # (P, H, N, T)
        image_scores = (image_k @ q[..., None]).squeeze(-1)  # (P, H, N, L)
        # One softmax over the text and the image keys together.
        weights = torch.cat((text_scores, image_scores), dim=-1).softmax(dim=-1)
        text_len = text_scores.shape[-1]
        y = weights[..., :text_len] @ self.text_v
        y = y + (weights[..., None, text_len:] @ image_v).squeeze(-2)
        return y.transpose(1, 2).flatten(0, 1).unsqueeze(2)

    def _by_prompt(self, x: Tensor) -> Tensor:  # (P · N, H, 1, D) -> (P, H, N, D)
        return x.squeeze(2).unflatten(0, (len(self.text_k), -1)).transpose(1, 2)


@lru_cache(maxsize=16)  # a few kinds of layers, many layers
def visible_positions(
    kind: LayerKind, grid: int, conv_kernel: int, device: torch.device
) -> tuple[slice | Tensor, ...]:
    """For each image token the earlier ones (and itself) that a layer of this kind lets it see.

    A slice where they are evenly spaced, which costs no copy; else their indices.
    """
    positions: list[slice | Tensor] = []
    for row in image_mask(kind, grid, conv_kernel):
        seen = row.nonzero().squeeze(1)
        gaps = seen.diff().unique()
        if len(gaps) <= 1:
            step = int(gaps[0]) if len(gaps) else 1
            positions.append(slice(int(seen[0]), int(seen[-1]) + 1, step))
        else:
            positions.append(seen.to(device))
    return tuple(positions)
