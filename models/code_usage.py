"""How a codebook is used: from the codes of pictures to counts, and from counts to figures.

Letters: K codes.
"""

import torch
from torch import Tensor


def code_counts(tokens: Tensor, vocab_size: int) -> Tensor:
    """How often each code occurs: (K,) int64."""
    return torch.bincount(tokens.flatten(), minlength=vocab_size)


def codes_used(counts: Tensor) -> int:
    """Number of codes that occur at all."""
    return int((counts > 0).sum())


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of the codes' frequencies: K if all are equally frequent."""
    p = counts.double() / counts.sum().clamp_min(1)
    return float(torch.special.entr(p).sum().exp())
