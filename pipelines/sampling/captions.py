"""Completing captions: text tokens from the prior's text head, until it says that one ends.

Letters: N candidates, T text slots, V text ids.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from models.prior import PAD_ID, START_ID
from pipelines.sampling.decoder import CaptionDecoder
from pipelines.sampling.diagnosis import non_finite_logits
from pipelines.sampling.drawing import SamplingConfig, draw, uniform_draws
from pipelines.sampling.packing import PackedPrior


@torch.inference_mode()
def complete_caption(
    packed: PackedPrior,
    text_tokens: Tensor,
    *,
    vocab_size: int,
    seeds: Sequence[int],
    sampling: SamplingConfig,
) -> Tensor:
    """Captions int64 (N, T) that begin as the one given (1, T), one a seed.

    `vocab_size` is the tokenizer's: the prior may know more ids, which stand for no text. A
    caption ends with its first padding, or with the last slot. `top_k` and `top_p` count ids here.
    """
    config = packed.prior.config
    length = int((text_tokens[0] != PAD_ID).sum())
    captions = text_tokens.repeat(len(seeds), 1)
    if length == config.text_len:
        return captions
    # Behind the draws that the picture takes, so that its own are the same with or without this.
    draws = uniform_draws(seeds, config.image_len + config.text_len)[:, config.image_len :]
    draws = draws.to(text_tokens.device)
    decoder = CaptionDecoder(packed.weights(sampling.precision), len(seeds), length)
    logits = decoder.prefill(text_tokens)
    ended = torch.zeros(len(seeds), dtype=torch.bool, device=text_tokens.device)
    for slot in range(length, config.text_len):
        if not torch.isfinite(logits).all():
            token, stack = f"text slot {slot} of {config.text_len}", decoder.stack
            streams = (decoder.embed(caption[None], slot) for caption in captions)
            raise non_finite_logits(token, stack, streams, slot, decoder.score)
        logits = logits[:, :vocab_size].clone()
        logits[:, START_ID] = -math.inf  # a caption has one
        ids = draw(logits, draws[:, slot], sampling).masked_fill(ended, PAD_ID)
        captions[:, slot] = ids
        ended |= ids == PAD_ID
        if ended.all() or slot + 1 == config.text_len:
            break
        logits = decoder.step(captions, slot)
    return captions
