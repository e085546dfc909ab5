"""Sampling pictures from a prior: one engine under the command line, the evaluation and the server.

Letters: P prompts, N candidates a prompt, B = P · N, T text slots, K image codes, H and W the
picture's sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.prior import Prior
from models.stage_one import StageOne
from pipelines.data.tokenizer import CaptionTokenizer
from pipelines.sampling.captions import complete_caption
from pipelines.sampling.codec import Codec
from pipelines.sampling.drawing import AS_LEARNED, SamplingConfig, candidate_seed, check_seed
from pipelines.sampling.image_tokens import OnProgress, ignore_progress, sample_image_tokens
from pipelines.sampling.packing import PackedPrior


@dataclass(frozen=True)
class Sample:
    """One sampled picture."""

    pixels: np.ndarray  # (H, W, 3) uint8
    tokens: np.ndarray  # (grid²,) int64
    seed: int
    caption: str = ""
    """What a prompt was completed to; empty where it was the caption."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a picture starts from besides its prompt."""

    tokens: np.ndarray | None = None
    """Its first image tokens, int64; whole rows of a grid, as `Sampler.first_rows` gives them."""
    complete_captions: bool = False
    """Whether the prior goes on with the prompt before it draws, for each picture anew."""


FROM_NOTHING = Start()


class Sampler(Codec):
    """Text in, pictures out: a tokenizer, a prior and a dVAE (or VQ-VAE) that belong together."""

    def __init__(
        self, prior: Prior, dvae: StageOne, tokenizer: CaptionTokenizer, *, max_candidates: int = 16
    ) -> None:
        """`max_candidates` is how many pictures advance together; it bounds the caches' memory."""
        if max_candidates < 1:
            raise ValueError(f"max_candidates must be at least 1, got {max_candidates}")
        super().__init__(prior.config, dvae, tokenizer)
        self.prior, self.max_candidates = prior.eval(), max_candidates
        self.packed = PackedPrior(prior)

    def generate(
        self,
        prompt: str,
        n: int = 1,
        seed: int = 0,
        sampling: SamplingConfig = AS_LEARNED,
    ) -> list[np.ndarray]:
        """`n` pictures (H, W, 3) uint8 for a prompt; the i-th has the seed `seed + i`."""
        samples = self.sample([prompt], n=n, seed=seed, sampling=sampling)
        return [sample.pixels for sample in samples[0]]

    def sample(
        self,
        prompts: Sequence[str],
        *,
        n: int,
        seed: int,
        sampling: SamplingConfig = AS_LEARNED,
        start: Start = FROM_NOTHING,
        on_progress: OnProgress = ignore_progress,
    ) -> list[list[Sample]]:
        """`n` pictures for each prompt; text beyond the prior's slots is cut off, as in training.

        `on_progress` sees one group of at most `max_candidates` after the other.
        """
        check_seed(seed)
        seeds = [candidate_seed(seed, index) for index in range(n)]
        results: list[list[Sample]] = [[] for _ in prompts]
        for first_seed in range(0, n, self.max_candidates):
            part = seeds[first_seed : first_seed + self.max_candidates]
            together = self.max_candidates // len(part)
            for first in range(0, len(prompts), together):
                group = prompts[first : first + together]
                samples = self._sample_group(group, part, sampling, start, on_progress)
                for index, sample in enumerate(samples):
                    results[first + index // len(part)].append(sample)
        return results

    def _sample_group(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        sampling: SamplingConfig,
        start: Start,
        on_progress: OnProgress,
    ) -> list[Sample]:
        text, candidates = self.encode_prompts(prompts), len(seeds)
        captions = [""] * (len(prompts) * candidates)
        if start.complete_captions:
            text = torch.cat([self._complete(row, seeds, sampling) for row in text])
            captions, candidates = [self.tokenizer.decode(row) for row in text.cpu().numpy()], 1
        tokens = sample_image_tokens(
            self.packed,
            text,
            candidates=candidates,
            seeds=list(seeds) * len(prompts),
            sampling=sampling,
            primed=self._primed(start, len(text)),
            on_progress=on_progress,
        )
        rows = zip(self.decode(tokens), tokens.cpu().numpy(), captions, strict=True)
        return [
            Sample(pixels, codes, seeds[index % len(seeds)], caption)
            for index, (pixels, codes, caption) in enumerate(rows)
        ]

    def _complete(self, text: Tensor, seeds: Sequence[int], sampling: SamplingConfig) -> Tensor:
        return complete_caption(
            self.packed,
            text[None],
            vocab_size=self.tokenizer.vocab_size,
            seeds=seeds,
            sampling=sampling,
        )

    def _primed(self, start: Start, prompts: int) -> Tensor:
        """(P, n) on the prior's device; n may be 0."""
        tokens = np.zeros(0, np.int64) if start.tokens is None else start.tokens
        return torch.from_numpy(tokens).to(self.device).expand(prompts, -1)
