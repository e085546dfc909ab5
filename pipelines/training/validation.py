"""Losses on pictures that are never learned: with the weights as they are, and averaged."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from models.prior import Prior, counted
from pipelines.data.split import VALIDATION
from pipelines.data.stage import Manifest
from pipelines.data.tokenizer import CaptionTokenizer
from pipelines.training.parallelize import plain_named_parameters
from pipelines.training.ranks import rank, world_size
from pipelines.training.token_loader import TokenBatch, read_tokens


class HeldOut:
    """Rows of the validation split: the same at every look, whole captions, no BPE dropout."""

    def __init__(
        self, manifest: Manifest, tokenizer: CaptionTokenizer, *, text_len: int, samples: int
    ) -> None:
        """At most `samples` rows, drawn once; a smaller split is taken whole."""
        _, captions, image_tokens = read_tokens(manifest, VALIDATION)
        rows = np.random.default_rng(0).permutation(len(captions))[:samples]
        self.captions = [captions[row] for row in rows]
        self._text = [tokenizer.encode(caption, text_len) for caption in self.captions]
        self._image = image_tokens[rows]

    def __len__(self) -> int:
        return len(self.captions)

    def shares(
        self, batch_samples: int, rank: int, world_size: int
    ) -> Iterator[tuple[TokenBatch, int]]:
        """A rank's batches, and how many of a batch's samples count.

        As many batches on every rank, since sharded weights are gathered by all at once: a rank
        with nothing left repeats a sample that does not count.
        """
        own = list(range(rank, len(self), world_size))
        longest = -(-len(self) // world_size)
        for start in range(0, longest, batch_samples):
            rows = own[start : start + batch_samples]
            yield self._batch(rows or [0]), len(rows)

    def _batch(self, rows: list[int]) -> TokenBatch:
        text = np.stack([self._text[row] for row in rows]).astype(np.int64)
        return TokenBatch(
            torch.from_numpy(text), torch.from_numpy(self._image[rows].astype(np.int64))
        )


@torch.no_grad()
def held_out_losses(
    prior: Prior,
    averaged: Mapping[str, Tensor],
    held_out: HeldOut,
    *,
    batch_samples: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> dict[str, float]:
    """Nats per token of captions and of pictures, over all ranks; every rank must ask.

    `averaged` are the averaged weights by name, `batch_samples` those of a rank's forward pass.
    """

    def losses(prefix: str) -> dict[str, float]:
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        for batch, count in held_out.shares(batch_samples, rank(), world_size()):
            text, image = batch.text_tokens.to(device), batch.image_tokens.to(device)
            with autocast():
                loss = prior(text, image)
            words = counted(text).sum()
            if count:
                sums += torch.stack(
                    [loss.text * words, words, loss.image * count, words * 0 + count]
                )
        if world_size() > 1:
            dist.all_reduce(sums)
        text_sum, text_tokens, image_sum, pictures = sums.tolist()
        return {
            f"{prefix}text_loss": text_sum / text_tokens,
            f"{prefix}image_loss": image_sum / pictures,
        }

    was_training = prior.training
    prior.eval()
    try:
        found = losses("validation.")
        with _weights_of(prior, averaged):
            found |= losses("validation.average.")
    finally:
        prior.train(was_training)
    return found


@contextmanager
def _weights_of(prior: Prior, others: Mapping[str, Tensor]) -> Iterator[None]:
    """Other weights in the prior's place; its own wait on the host, and come back bit for bit."""
    _forget_gathered(prior)
    own = {}
    for name, parameter in plain_named_parameters(prior):
        own[name] = parameter.detach().to("cpu", copy=True)
        parameter.copy_(others[name])
    try:
        yield
    finally:
        _forget_gathered(prior)
        for name, parameter in plain_named_parameters(prior):
            parameter.copy_(own[name])


def _forget_gathered(prior: Prior) -> None:
    """Whole weights that FSDP has kept since the forward pass are not those in the shards."""
    for module in prior.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
