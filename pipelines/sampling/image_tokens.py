"""Sampling the image tokens of encoded prompts, all candidates at once.

Letters: P prompts, N candidates a prompt, B = P · N, T text slots, n image tokens that are given, K
image codes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.prior import PAD_ID, START_ID, PriorConfig
from pipelines.sampling.decoder import CachedDecoder
from pipelines.sampling.diagnosis import NonFiniteLogits, non_finite_logits
from pipelines.sampling.drawing import SamplingConfig, draw, uniform_draws
from pipelines.sampling.packing import PackedPrior, StepWeights

OnProgress = Callable[[int, Tensor], None]


def ignore_progress(done: int, tokens: Tensor) -> None:
    """What is done with the tokens so far if nobody asks for them."""


@torch.inference_mode()
def sample_image_tokens(
    packed: PackedPrior,
    text_tokens: Tensor,
    *,
    candidates: int,
    seeds: Sequence[int],
    sampling: SamplingConfig,
    primed: Tensor | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Tensor:
    """Image tokens int64 (B, grid²) of encoded prompts (P, T), N = `candidates` for each.

    `seeds` has one entry a candidate. Its draws depend on its seed alone, not on the batch; only a
    draw that falls on the edge of two codes can turn with the rounding of another batch size.
    `primed` (P, n) are the first tokens of each prompt's pictures, kept as they are.
    `on_progress(done, tokens)` is called after each token; what it raises ends the sampling.
    """
    config = packed.prior.config
    length, rows = config.image_len, len(text_tokens) * candidates
    sampling.check(config.image_vocab_size)
    if candidates < 1 or rows < 1:
        raise ValueError(f"there must be a prompt and a candidate, got {rows} candidates")
    draws = uniform_draws(seeds, length).to(text_tokens.device)
    if len(draws) != rows:
        raise ValueError(f"seeds must be one a candidate, {rows} of them, got {len(draws)}")
    if primed is None:
        primed = text_tokens.new_zeros(len(text_tokens), 0)
    packed.prior.check_tokens(text_tokens, text_tokens.new_zeros(1, length, dtype=torch.int64))
    check_primed(primed, config, len(text_tokens))
    tokens = torch.zeros(rows, length, dtype=torch.int64, device=text_tokens.device)
    given = primed.shape[1]
    tokens[:, :given] = primed.repeat_interleave(candidates, dim=0)
    walk = _Walk(packed.weights(sampling.precision), text_tokens, candidates, sampling, tokens)
    for position in range(given, length):
        logits = walk.logits(position, given)
        tokens[:, position] = draw(logits, draws[:, position], sampling)
        on_progress(position + 1, tokens)
    return tokens


class _Walk:
    """From position to position, with or without the empty caption at the prompts' side."""

    def __init__(
        self,
        weights: StepWeights,
        text_tokens: Tensor,
        candidates: int,
        sampling: SamplingConfig,
        tokens: Tensor,
    ) -> None:
        self.guided, self.scale = sampling.guided, sampling.cond_scale
        null = null_prompt(weights.config, text_tokens)
        self.text_tokens = torch.cat((text_tokens, null)) if self.guided else text_tokens
        self.decoder, self.tokens = CachedDecoder(weights, candidates), tokens
        self.finite = torch.ones(tokens.shape[1], dtype=torch.bool, device=tokens.device)

    def logits(self, position: int, given: int) -> Tensor:  # -> (B, K)
        """The logits of a position; those before it, beyond `given`, have been asked for."""
        if position == given:
            candidates = self.decoder.candidates
            primed = self._both(self.tokens[::candidates, :given])
            logits = self.decoder.prefill(self.text_tokens, primed)
        else:
            logits = self.decoder.step(self._both(self.tokens[:, position - 1]), position - 1)
        if self.guided:
            captioned, empty = logits.chunk(2)
            logits = torch.lerp(empty, captioned, self.scale)
        # 0 times a number is 0, times infinity or NaN it is NaN; isfinite takes ten times as
        # long on 16 rows of 8,192 logits.
        self.finite[position] = (logits * 0).sum() == 0
        # Once a row of the picture, because a GPU would have to be waited for.
        last = (position + 1) % self.decoder.weights.config.grid == 0
        if (last or not logits.is_cuda) and not self.finite.all():
            raise self._broken()
        return logits

    def _both(self, tokens: Tensor) -> Tensor:
        return torch.cat((tokens, tokens)) if self.guided else tokens

    def _broken(self) -> NonFiniteLogits:
        position, length = int(self.finite.int().argmin()), len(self.finite)
        decoder = self.decoder
        text_tokens = self.text_tokens.repeat_interleave(decoder.candidates, dim=0)
        rows = zip(text_tokens, self._both(self.tokens[:, :position]), strict=True)
        return non_finite_logits(
            f"image token {position} of {length}",
            decoder.stack,
            (decoder.embed(text[None], image[None]) for text, image in rows),
            text_tokens.shape[1],
            decoder.score,
        )


def null_prompt(config: PriorConfig, like: Tensor) -> Tensor:
    """The empty caption, as often as there are prompts: what caption dropout trains."""
    null = torch.full((len(like), config.text_len), PAD_ID, device=like.device, dtype=torch.int64)
    null[:, 0] = START_ID
    return null


def check_primed(primed: Tensor, config: PriorConfig, prompts: int) -> None:
    """Refuse first tokens that are not this prior's, or more than there are."""
    if primed.dtype != torch.int64 or primed.ndim != 2 or len(primed) != prompts:
        raise ValueError(
            f"primed must be int64 ({prompts}, n), got {primed.dtype} {tuple(primed.shape)}"
        )
    if primed.shape[1] > config.image_len:
        raise ValueError(
            f"primed must have at most the grid's {config.image_len} tokens, got {primed.shape[1]}"
        )
    if primed.numel():
        low, high = int(primed.min()), int(primed.max())
        if low < 0 or high >= config.image_vocab_size:
            raise ValueError(
                f"primed must be in [0, {config.image_vocab_size}), got {low} … {high}"
            )
