"""How a token is drawn from logits: the settings, the seeds and the draw itself.

Letters: B rows, K codes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.sampling.packing import DTYPES, Precision

ALL_CODES = 1 << 16  # tokens are stored as uint16: no codebook has more
LARGEST_SEED = (1 << 53) - 1  # the integers that every JSON reader keeps exact


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a token is drawn from the prior's distribution."""

    temperature: float = 1.0
    """Divides the logits; near 0 the most likely code is taken."""
    top_k: int = ALL_CODES
    """Codes that may be drawn, the most likely ones; the default leaves none out."""
    top_p: float = 1.0
    """Of these the most likely ones that have this probability together; 1 leaves none out."""
    cond_scale: float = 1.0
    """How far the caption's logits are pushed away from the empty caption's (classifier-free
    guidance): 1 is the caption alone and costs nothing, else work and caches double. Needs a prior
    that was trained with caption_dropout."""
    precision: Precision = "fp32"
    """Of the resblocks' branches; the residual stream and the logits are always fp32. bf16 takes a
    second copy of the weights, and is slow on a CPU that has no instructions for it."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if not 1 <= self.top_k <= ALL_CODES:
            raise ValueError(f"top_k must be 1 or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not (math.isfinite(self.cond_scale) and self.cond_scale >= 0):
            raise ValueError(f"cond_scale must be 0 or more and finite, got {self.cond_scale}")
        if self.precision not in DTYPES:
            raise ValueError(f"precision must be one of {list(DTYPES)}, got {self.precision!r}")

    def check(self, vocab_size: int) -> None:
        """Refuse a top_k that this codebook does not have."""
        if self.top_k > vocab_size and self.top_k != ALL_CODES:
            raise ValueError(f"top_k must be 1 to {vocab_size}, got {self.top_k}")

    @property
    def guided(self) -> bool:
        """Whether the empty caption is needed too."""
        return self.cond_scale != 1


AS_LEARNED = SamplingConfig()  # the prior's own distribution


def draw(logits: Tensor, uniform: Tensor, sampling: SamplingConfig) -> Tensor:
    """Codes (B,) of fp32 logits (B, K): the cumulative distribution inverted at `uniform` (B,)."""
    vocab_size = logits.shape[1]
    if sampling.top_k < vocab_size:
        least = logits.topk(sampling.top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    # float64: in fp32 a cumulative sum over 8,192 codes would lose the unlikely ones.
    # In place, because fresh memory of that size costs more than what is computed in it.
    scaled = logits.to(torch.float64, copy=True)
    scaled.sub_(scaled.amax(dim=1, keepdim=True)).div_(sampling.temperature)
    probabilities = torch.softmax(scaled, dim=1)
    if sampling.top_p < 1:
        probabilities = nucleus(probabilities, sampling.top_p)
    cumulative = probabilities.cumsum(dim=1)
    # The sum need not be 1: a rounding error, or what top_p leaves out.
    wanted = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(1).clamp_(max=vocab_size - 1)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """(B, K) with 0 outside the fewest most likely codes that sum to `top_p` (Holtzman, 2020).

    Codes as likely as the last of them stay too, as they do with top_k.
    """
    ordered = probabilities.sort(dim=1, descending=True).values
    last = (ordered.cumsum(dim=1) < top_p).sum(dim=1, keepdim=True)
    last.clamp_(max=ordered.shape[1] - 1)  # where a rounding error leaves the sum below top_p
    return probabilities.masked_fill(probabilities < ordered.gather(1, last), 0.0)


def uniform_draws(seeds: Sequence[int], length: int) -> Tensor:
    """float64 (B, length) in [0, 1): each row from a generator of its own, on the CPU.

    One number a token, turned into a code by `draw`, where Gumbel noise would take K.
    """
    draws = torch.empty(len(seeds), length, dtype=torch.float64)
    for row, seed in zip(draws, seeds, strict=True):
        check_seed(seed)
        row.uniform_(generator=torch.Generator().manual_seed(seed))
    return draws


def check_seed(seed: int) -> None:
    """Refuse a seed that is negative, or that JSON would round."""
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed must be 0 to {LARGEST_SEED}, got {seed}")


def candidate_seed(seed: int, index: int) -> int:
    """The seed of a request's candidate: alone, it gives the same picture again."""
    return (seed + index) % (LARGEST_SEED + 1)
