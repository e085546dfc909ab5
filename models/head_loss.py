"""Cross-entropy of a head's logits that keeps one number a logit, not three.

Autograd keeps the logits, their log-probabilities and the gradient of the logits. Here the
gradient, up to a factor, is made in the logits' own memory while the loss is, and nothing else is
kept.

Letters: M positions, C model width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.linear import product, transposed_product


def mean_cross_entropy(x: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """The mean over positions of F.cross_entropy(head(x), targets), (M, C) and int64 (M,).

    In fp32 whatever the autocast precision: 16-bit logits moved the paper's loss curve (appendix
    D.2).
    """
    with torch.autocast(x.device.type, enabled=False):
        loss: Tensor = _HeadLoss.apply(x.float(), head.weight, head.bias, targets)
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, targets: Tensor) -> Tensor:
        logits = product(x, w, b)  # (M, V)
        logits.sub_(logits.amax(dim=1, keepdim=True))
        places = targets[:, None]
        target_logits = logits.gather(1, places)
        sums = logits.exp_().sum(dim=1, keepdim=True)
        # Probabilities, less one at the target: M times the gradient of the logits.
        errors = logits.div_(sums).scatter_add_(1, places, torch.full_like(target_logits, -1.0))
        ctx.save_for_backward(x, w, errors)
        return (sums.log() - target_logits).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, w, errors = ctx.saved_tensors
        factor = gradient / len(errors)
        dx = product(errors, w.t()).mul_(factor)
        dw = transposed_product(errors, x).mul_(factor)
        return dx, dw, errors.sum(dim=0).mul_(factor), None
