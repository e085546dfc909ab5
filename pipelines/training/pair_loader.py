"""Batches of augmented pictures with their captions, as a function of one integer.

The pictures are `picture_loader`'s; a picture that gives way to the next one takes its caption
along.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipelines.data.caption_slots import CaptionSlots, OwnSlots
from pipelines.data.tokenizer import CaptionTokenizer
from pipelines.training.picture_loader import (
    WINDOW_SHARDS,
    Arrays,
    PictureBatch,
    PictureLoader,
    PictureSource,
)


@dataclass(frozen=True)
class PairBatch:
    """One rank's pairs of one update."""

    pictures: PictureBatch
    tokens: Tensor
    """(B, T) int64, the captions' slots."""
    ends: Tensor
    """(B,) int64, the place of each caption's last slot."""

    @classmethod
    def unpack(cls, arrays: Arrays) -> "PairBatch":
        """The batch in what `PairLoader.arrays` gave."""
        tokens, ends = (torch.from_numpy(arrays[name]) for name in ("tokens", "ends"))
        return cls(PictureBatch.unpack(arrays), tokens, ends)


class PairLoader:
    """Reads the pairs of a filtered dataset; indexed by the number of the update."""

    def __init__(self, pictures: PictureLoader, captions: CaptionSlots, text_len: int) -> None:
        self.pictures, self.slots, self.text_len = pictures, captions, text_len
        self._captions = lru_cache(maxsize=2 * WINDOW_SHARDS)(self._read_captions)

    def arrays(self, step: int) -> Arrays:
        """What `PictureLoader.arrays` gives, `tokens` (B, T) and `ends` (B,)."""
        picked, unusable = self.pictures.pick(step)
        captions = [self._captions(one.shard)[one.row] for one in picked]
        tokens, ends = self.slots.slots(captions, self.text_len)
        return {
            "squares": np.stack([one.square for one in picked]),
            "unusable": np.array(unusable),
            "tokens": tokens,
            "ends": ends,
        }

    def keys(self, step: int) -> list[str]:
        """The keys of the pairs of a batch."""
        return self.pictures.keys(step)

    def _read_captions(self, shard: int) -> list[str]:
        return self.pictures.column(shard, "caption")


@dataclass(frozen=True, kw_only=True)
class PairSource:
    """As `PictureSource`."""

    pictures: PictureSource
    tokenizer: Path
    text_len: int

    def loader(self, rank: int, world_size: int) -> PairLoader:
        """What makes a rank's batches."""
        captions = OwnSlots(CaptionTokenizer.from_file(self.tokenizer))
        return PairLoader(self.pictures.loader(rank, world_size), captions, self.text_len)
