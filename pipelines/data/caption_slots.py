"""Captions as the slots of a contrastive model's text tower, which reads a caption's last slot."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from pipelines.data.tokenizer import PAD_ID, CaptionTokenizer


class CaptionSlots(Protocol):
    """A vocabulary that a contrastive model was trained with."""

    @property
    def vocab_size(self) -> int: ...

    def slots(self, captions: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids (N, length) int64 and the place of each caption's last slot (N,) int64."""


class OwnSlots:
    """manray's tokenizer: START, the caption, and a PAD that ends it, as it does for the prior."""

    def __init__(self, tokenizer: CaptionTokenizer) -> None:
        self.tokenizer = tokenizer

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def slots(self, captions: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.full((len(captions), length), PAD_ID, dtype=np.int64)
        for row, caption in enumerate(captions):
            ids[row, :-1] = self.tokenizer.encode(caption, length - 1)
        return ids, (ids != PAD_ID).sum(axis=1)
