"""What the captions' losses of a batch's parts weigh, so that the batch's loss is their mean.

The paper divides by the number of text tokens in the batch (section 2.2). Captions differ in
length, so that this is not the mean of the parts' means, and would depend on how many workers and
micro batches a batch is cut into.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from models.prior import counted
from pipelines.training.ranks import world_size


class TextWeights:
    """Of this rank's micro batches, whose weighed losses are then summed up as a mean."""

    def __init__(self, captions: Sequence[Tensor]) -> None:
        """Begin to count: `captions` (B, text_len) are the micro batches'. Every rank must."""
        ranks = world_size()
        tokens = torch.stack([counted(part).sum() for part in captions]).float()
        self._share, self._all = tokens * (len(captions) * ranks), tokens.sum()
        self._counting = dist.all_reduce(self._all, async_op=True) if ranks > 1 else None

    def of(self, part: int) -> Tensor:
        """A number on the captions' device; waits for the other ranks' counts."""
        if self._counting is not None:
            self._counting.wait()
        return self._share[part] / self._all
