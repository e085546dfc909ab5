"""Batches of captions and image tokens, as a function of one integer.

Sample p of a run (p = step · batch + place in the batch) is row `permutation(seed, p // N)[p % N]`
of the N rows: a resumed run, on any number of ranks, sees exactly what the uninterrupted one would
have seen.
"""

import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from models.prior import PriorConfig
from pipelines.data.split import TRAIN, Split, read_split
from pipelines.data.stage import Manifest
from pipelines.data.tokenizer import CaptionTokenizer


@dataclass(frozen=True)
class TokenBatch:
    """One rank's part of a global batch; int64."""

    text_tokens: Tensor  # (B, text_len)
    image_tokens: Tensor  # (B, grid²)


class TokenLoader:
    """Reads token shards into memory: 2 · grid² bytes and a caption per picture."""

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: CaptionTokenizer,
        *,
        text_len: int,
        batch_samples: int,
        bpe_dropout: float,
        seed: int,
        caption_dropout: float = 0.0,
        rank: int = 0,
        world_size: int = 1,
        split: Split = TRAIN,
    ) -> None:
        if batch_samples % world_size:
            raise ValueError(
                f"batch_samples must divide by the workers, got {batch_samples}, {world_size}"
            )
        self.tokenizer, self.text_len = tokenizer, text_len
        self.batch_samples, self.bpe_dropout, self.seed = batch_samples, bpe_dropout, seed
        self.caption_dropout = caption_dropout
        self.rank, self.world_size = rank, world_size
        self.keys, self.captions, self.image_tokens = read_tokens(manifest, split)
        if not self.keys:
            raise ValueError(f"{manifest.path} must hold at least one {split} row, got none")
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def __len__(self) -> int:
        return len(self.keys)

    def batch(self, step: int) -> TokenBatch:
        """This rank's samples of the global batch of update `step`."""
        positions = self._positions(step)
        rows = [self._row(position) for position in positions]
        text = [self._encode(row, position) for row, position in zip(rows, positions, strict=True)]
        return TokenBatch(
            text_tokens=torch.from_numpy(np.stack(text).astype(np.int64)),
            image_tokens=torch.from_numpy(self.image_tokens[rows].astype(np.int64)),
        )

    def keys_of(self, step: int) -> list[str]:
        """Names of this rank's samples of update `step`."""
        return [self.keys[self._row(position)] for position in self._positions(step)]

    def all_keys_of(self, step: int) -> list[str]:
        """Names of all ranks' samples of update `step`."""
        first = step * self.batch_samples
        return [self.keys[self._row(first + place)] for place in range(self.batch_samples)]

    def _positions(self, step: int) -> range:
        share = self.batch_samples // self.world_size
        first = step * self.batch_samples + self.rank * share
        return range(first, first + share)

    def _row(self, position: int) -> int:
        epoch, place = divmod(position, len(self))
        return int(self._permutation(epoch)[place])

    def _encode(self, row: int, position: int) -> np.ndarray:
        caption = "" if self._is_dropped(position) else self.captions[row]
        if not self.bpe_dropout:
            return self.tokenizer.encode(caption, self.text_len)
        rng = random.Random(f"{self.seed}/{position}")
        return self.tokenizer.encode(caption, self.text_len, dropout=self.bpe_dropout, rng=rng)

    def _is_dropped(self, position: int) -> bool:
        """Whether a sample's caption is left empty; its own draw, BPE dropout's stay the same."""
        if not self.caption_dropout:
            return False
        return random.Random(f"{self.seed}/{position}/caption").random() < self.caption_dropout

    def _permute(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self))


def read_tokens(
    manifest: Manifest, split: Split = "all"
) -> tuple[list[str], list[str], np.ndarray]:
    """Keys, captions and image tokens (N, grid²) uint16 of a token dataset, in its own order."""
    keys: list[str] = []
    captions: list[str] = []
    tokens = []
    for part in manifest.shards:
        table = read_split(manifest, part.shard, ["key", "caption", "image_tokens"], split)
        keys += table["key"].to_pylist()
        captions += table["caption"].to_pylist()
        column = table["image_tokens"].combine_chunks()
        width = column.type.byte_width // 2
        values = np.frombuffer(column.buffers()[1], dtype="<u2")
        start = column.offset * width
        tokens.append(values[start : start + len(column) * width].reshape(-1, width))
    return keys, captions, np.concatenate(tokens) if tokens else np.empty((0, 0), np.uint16)


def check_inputs(
    manifest: Manifest, prior: PriorConfig, tokenizer: CaptionTokenizer, *, dvae_digest: str
) -> None:
    """Refuse token shards that do not fit the tokenizer, the dVAE or the prior at hand."""
    check_digest(manifest, "tokenizer", tokenizer.digest)
    check_digest(manifest, "dvae", dvae_digest)
    if tokenizer.vocab_size > prior.text_vocab_size:
        raise ValueError(
            f"prior.text_vocab_size must be at least the tokenizer's {tokenizer.vocab_size}, "
            f"got {prior.text_vocab_size}"
        )
    shards = manifest.read(manifest.shards[0].shard).schema.metadata
    grid = int(shards[b"manray.grid"])
    if grid != prior.grid:
        raise ValueError(f"prior.grid must be {grid} as in {manifest.path}, got {prior.grid}")


def check_digest(manifest: Manifest, name: str, digest: str) -> None:
    """Refuse a dataset that was made with another tokenizer or dVAE than the one given."""
    found = manifest.inputs.get(name)
    if found != digest:
        raise ValueError(
            f"{manifest.path} was made with {name} {found}, but the {name} given is {digest}: "
            "nothing was written; give the one it was made with, or encode again"
        )
