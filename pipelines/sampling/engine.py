"""Sampling pictures from a prior: one engine under the command line, the evaluation and the server.

Letters: P prompts, N candidates a prompt, B = P · N, T text slots, K image codes, H and W the
picture's sides.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.prior import Prior, PriorConfig
from models.stage_one import StageOne, StageOneConfig
from pipelines.data.tokenizer import CaptionTokenizer
from pipelines.sampling.decoder import CachedDecoder

ALL_CODES = 1 << 16  # tokens are stored as uint16: no codebook has more
LARGEST_SEED = (1 << 53) - 1  # the integers that every JSON reader keeps exact

OnProgress = Callable[[int, Tensor], None]


class NonFiniteLogits(RuntimeError):
    """The prior gave NaN or infinite logits: no picture is made of them."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How an image token is drawn from the prior's distribution."""

    temperature: float = 1.0
    """Divides the logits; near 0 the most likely code is taken."""
    top_k: int = ALL_CODES
    """Codes that may be drawn, the most likely ones; the default leaves none out."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if not 1 <= self.top_k <= ALL_CODES:
            raise ValueError(f"top_k must be 1 or more, got {self.top_k}")

    def check(self, vocab_size: int) -> None:
        """Refuse a top_k that this codebook does not have."""
        if self.top_k > vocab_size and self.top_k != ALL_CODES:
            raise ValueError(f"top_k must be 1 to {vocab_size}, got {self.top_k}")


def ignore_progress(done: int, tokens: Tensor) -> None:
    """What is done with the tokens so far if nobody asks for them."""


@torch.inference_mode()
def sample_image_tokens(
    prior: Prior,
    text_tokens: Tensor,
    *,
    candidates: int,
    seeds: Sequence[int],
    sampling: SamplingConfig,
    on_progress: OnProgress = ignore_progress,
) -> Tensor:
    """Image tokens int64 (P · N, grid²) of encoded prompts (P, T), N = `candidates` for each.

    `seeds` has one entry a candidate. Its draws depend on its seed alone, not on the batch; only a
    draw that falls on the edge of two codes can turn with the rounding of another batch size.
    `on_progress(done, tokens)` is called after each token; what it raises ends the sampling.
    """
    sampling.check(prior.config.image_vocab_size)
    length = prior.config.image_len
    rows = len(text_tokens) * candidates
    if candidates < 1 or rows < 1:
        raise ValueError(f"there must be a prompt and a candidate, got {rows} candidates")
    draws = uniform_draws(seeds, length).to(text_tokens.device)
    if len(draws) != rows:
        raise ValueError(f"seeds must be one a candidate, {rows} of them, got {len(draws)}")
    decoder = CachedDecoder(prior, candidates)
    tokens = torch.zeros(rows, length, dtype=torch.int64, device=text_tokens.device)
    logits = decoder.prefill(text_tokens)
    for position in range(length):
        if not torch.isfinite(logits).all():
            raise NonFiniteLogits(
                f"the prior's logits of image token {position} of {length} must be finite, "
                "got NaN or infinity: the model file is not usable"
            )
        tokens[:, position] = draw(logits, draws[:, position], sampling)
        on_progress(position + 1, tokens)
        if position + 1 < length:
            logits = decoder.step(tokens[:, position], position)
    return tokens


def uniform_draws(seeds: Sequence[int], length: int) -> Tensor:
    """float64 (B, length) in [0, 1): each row from a generator of its own, on the CPU.

    One number a token, turned into a code by `draw`, where Gumbel noise would take K.
    """
    draws = torch.empty(len(seeds), length, dtype=torch.float64)
    for row, seed in zip(draws, seeds, strict=True):
        check_seed(seed)
        row.uniform_(generator=torch.Generator().manual_seed(seed))
    return draws


def draw(logits: Tensor, uniform: Tensor, sampling: SamplingConfig) -> Tensor:
    """Codes (B,) of fp32 logits (B, K): the cumulative distribution inverted at `uniform` (B,)."""
    vocab_size = logits.shape[1]
    if sampling.top_k < vocab_size:
        least = logits.topk(sampling.top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    # float64: in fp32 a cumulative sum over 8,192 codes would lose the unlikely ones.
    logits = logits.double()
    scaled = (logits - logits.amax(dim=1, keepdim=True)) / sampling.temperature
    cumulative = torch.softmax(scaled, dim=1).cumsum(dim=1)
    # The sum may end a rounding error below 1; scaling by it keeps every draw inside.
    wanted = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(1).clamp_(max=vocab_size - 1)


@dataclass(frozen=True)
class Sample:
    """One sampled picture."""

    pixels: np.ndarray  # (H, W, 3) uint8
    tokens: np.ndarray  # (grid²,) int64
    seed: int


class Sampler:
    """Text in, pictures out: a tokenizer, a prior and a dVAE (or VQ-VAE) that belong together."""

    def __init__(
        self, prior: Prior, dvae: StageOne, tokenizer: CaptionTokenizer, *, max_candidates: int = 16
    ) -> None:
        """`max_candidates` is how many pictures advance together; it bounds the caches' memory."""
        check_fit(prior.config, dvae.config, tokenizer)
        if max_candidates < 1:
            raise ValueError(f"max_candidates must be at least 1, got {max_candidates}")
        self.prior, self.dvae, self.tokenizer = prior.eval(), dvae.eval(), tokenizer
        self.max_candidates = max_candidates
        self.device = prior.row_position.device

    @property
    def image_size(self) -> int:
        """Side of the pictures in pixels."""
        return self.dvae.config.image_size

    @property
    def prompt_limit(self) -> int:
        """Most tokens that a prompt can have: one slot is the start token's."""
        return self.prior.config.text_len - 1

    def check_prompt(self, prompt: str) -> int:
        """The prompt's length in tokens; refuses one that is blank or would be cut off."""
        if not prompt.strip():
            raise ValueError("prompt must not be blank")
        if "\0" in prompt:
            raise ValueError("prompt must not contain NUL characters")
        # Every token stands for at least one byte of the text: this bounds the work below.
        length = self.tokenizer.count(prompt)
        if length > self.prompt_limit:
            raise ValueError(
                f"prompt must have at most {self.prompt_limit} tokens, got {length}: shorten it"
            )
        return length

    def generate(
        self,
        prompt: str,
        n: int = 1,
        seed: int = 0,
        sampling: SamplingConfig = SamplingConfig(),
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
        sampling: SamplingConfig = SamplingConfig(),
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
                samples = self._sample_group(group, part, sampling, on_progress)
                for index, sample in enumerate(samples):
                    results[first + index // len(part)].append(sample)
        return results

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """int64 (P, T) on the prior's device."""
        length = self.prior.config.text_len
        rows = np.stack([self.tokenizer.encode(prompt, length) for prompt in prompts])
        return torch.from_numpy(rows.astype(np.int64)).to(self.device)

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> np.ndarray:
        """Pictures (B, H, W, 3) uint8 of image tokens (B, grid²)."""
        grid = self.prior.config.grid
        pixels = self.dvae.decode(tokens.to(self.device).view(-1, grid, grid))
        return (pixels * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    def _sample_group(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        sampling: SamplingConfig,
        on_progress: OnProgress,
    ) -> list[Sample]:
        tokens = sample_image_tokens(
            self.prior,
            self.encode_prompts(prompts),
            candidates=len(seeds),
            seeds=list(seeds) * len(prompts),
            sampling=sampling,
            on_progress=on_progress,
        )
        rows = zip(self.decode(tokens), tokens.cpu().numpy(), strict=True)
        return [
            Sample(pixels, codes, seeds[index % len(seeds)])
            for index, (pixels, codes) in enumerate(rows)
        ]


def check_seed(seed: int) -> None:
    """Refuse a seed that is negative, or that JSON would round."""
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed must be 0 to {LARGEST_SEED}, got {seed}")


def candidate_seed(seed: int, index: int) -> int:
    """The seed of a request's candidate: alone, it gives the same picture again."""
    return (seed + index) % (LARGEST_SEED + 1)


def check_fit(prior: PriorConfig, dvae: StageOneConfig, tokenizer: CaptionTokenizer) -> None:
    """Refuse models whose grids or vocabularies differ."""
    for name, have, want in (
        ("grid", prior.grid, dvae.grid),
        ("image vocabulary", prior.image_vocab_size, dvae.vocab_size),
    ):
        if have != want:
            raise ValueError(f"the prior's {name} must be the dVAE's, got {have} and {want}")
    if tokenizer.vocab_size > prior.text_vocab_size:
        raise ValueError(
            f"the prior's text vocabulary must hold the tokenizer's {tokenizer.vocab_size} ids, "
            f"got {prior.text_vocab_size}"
        )
