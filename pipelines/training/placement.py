"""Which of the prior's parameters are sharded, and along which dimension."""

from collections.abc import Sequence

from torch import Tensor


def is_replicated(parameter: Tensor) -> bool:
    """Whether a resblock's parameter is whole on every worker: gains and biases."""
    return parameter.ndim == 1


def sharded_dimension(shape: Sequence[int], shards: int) -> int:
    """The MLP's second matrix (C, 4C) along its longer side, so that shards are nearer a square.

    All others along their rows, which are as many as their columns or more. A square compresses
    best: an (m, n) matrix of rank r is sent as r(m + n) numbers.
    """
    return int(len(shape) == 2 and shape[1] > shape[0] and shape[1] % shards == 0)
