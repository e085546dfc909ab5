"""How well a prior predicts pictures and captions, and whether it heeds the captions at all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.prior import Prior, counted

OnRows = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class TokenLosses:
    """Cross-entropies in nats per token."""

    text: float
    image: float


@torch.inference_mode()
def token_losses(
    prior: Prior,
    text_tokens: Tensor,
    image_tokens: Tensor,
    *,
    batch_samples: int,
    on_rows: OnRows,
) -> TokenLosses:
    """Means over all tokens of captions (N, T) and pictures (N, grid²), counted as in training.

    `on_rows(count)` is called after each batch.
    """
    device = prior.row_position.device
    text_sum = image_sum = 0.0
    text_count = 0
    for text, image in zip(
        text_tokens.split(batch_samples), image_tokens.split(batch_samples), strict=True
    ):
        text, image = text.to(device), image.to(device)
        text_logits, image_logits = prior.logits(text, image)
        targets, counts = text[:, 1:], counted(text)
        text_sum += float(F.cross_entropy(text_logits[counts], targets[counts], reduction="sum"))
        text_count += int(counts.sum())
        image_sum += float(
            F.cross_entropy(image_logits.flatten(0, 1), image.flatten(), reduction="sum")
        )
        on_rows(len(text))
    return TokenLosses(text=text_sum / text_count, image=image_sum / image_tokens.numel())


def shuffle_captions(captions: Sequence[str]) -> list[str]:
    """For each row another row's caption, never an equal one; the same for the same captions."""
    count = len(captions)
    shuffled = []
    for row, caption in enumerate(captions):
        others = (captions[(row + count // 2 + step) % count] for step in range(count))
        other = next((text for text in others if text != caption), None)
        if other is None:
            raise ValueError(f"captions must differ from each other, all are {caption[:80]!r}")
        shuffled.append(other)
    return shuffled
