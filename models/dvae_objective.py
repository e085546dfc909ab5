"""The evidence lower bound (ELB) that trains the dVAE, relaxed and hard (paper, A.2).

Letters: B batch, K codes, g grid side, H and W picture sides. Everything is in nats per channel
of a pixel: sums over the picture are divided by H * W * 3.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.dvae import DVAE
from models.likelihood import display_pixels, picture_log_likelihood
from models.schedules import cosine, linear_warmup


@dataclass(frozen=True, kw_only=True)
class DVAESchedule:
    """What moves over the updates, each along half a cosine. The defaults are the paper's (A.2)."""

    beta_start: float = 0.0
    beta_end: float = 6.6
    """Weight of the KL term."""
    beta_steps: int = 5_000
    tau_start: float = 1.0
    tau_end: float = 1 / 16
    """Temperature of the relaxation; linear annealing typically diverged (paper)."""
    tau_steps: int = 150_000
    lr_start: float = 1e-4
    lr_end: float = 1.25e-6
    """Step size."""
    lr_steps: int = 1_200_000
    warmup_steps: int = 0
    """Updates over which the step size rises linearly; the paper has none."""

    def __post_init__(self) -> None:
        if min(self.tau_start, self.tau_end) <= 0:
            raise ValueError(
                f"tau_start and tau_end must be positive, got {self.tau_start}, {self.tau_end}"
            )

    def at(self, step: int) -> dict[str, float]:
        """All three, by name, for update number `step` (0, 1, …)."""
        return {"tau": self.tau(step), "beta": self.beta(step), "lr": self.lr(step)}

    def beta(self, step: int) -> float:
        return cosine(step, start=self.beta_start, end=self.beta_end, steps=self.beta_steps)

    def tau(self, step: int) -> float:
        return cosine(step, start=self.tau_start, end=self.tau_end, steps=self.tau_steps)

    def lr(self, step: int) -> float:
        lr = cosine(step, start=self.lr_start, end=self.lr_end, steps=self.lr_steps)
        return lr * linear_warmup(step, self.warmup_steps)


@dataclass(frozen=True, kw_only=True)
class ELB:
    """A bound and its two parts, each a scalar: mean over the batch, nats per pixel channel."""

    reconstruction: Tensor
    """Log density of the pixels given the codes."""
    kl: Tensor
    """Divergence of the codes' distribution from the uniform one."""
    beta: float
    """Weight of the divergence."""
    tokens: Tensor
    """The most likely codes, (B, g, g) int64."""

    @property
    def value(self) -> Tensor:
        """The bound itself, to be maximised; a lower bound of ln p only if beta >= 1."""
        return self.reconstruction - self.beta * self.kl


def relaxed_elb(
    model: DVAE, pixels: Tensor, *, tau: float, beta: float, generator: torch.Generator
) -> ELB:
    """The bound with codes relaxed at temperature tau: what is trained on."""
    logits = model.logits(pixels)
    codes = gumbel_softmax(logits, tau, gumbel_noise(logits, generator))
    return _elb(pixels, model.decoder(codes), logits, beta)


def hard_elb(model: DVAE, pixels: Tensor, *, beta: float, generator: torch.Generator) -> ELB:
    """The bound with one-hot codes drawn from the encoder: what is reported.

    The draw is the limit of the relaxed one for tau to 0, so that with an equal generator the gap
    of the two bounds measures the relaxation and not the noise.
    """
    logits = model.logits(pixels)
    tokens = (logits + gumbel_noise(logits, generator)).argmax(dim=1)
    return _elb(pixels, model.stats(tokens), logits, beta)


def gumbel_noise(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise of the logits' shape."""
    waits = torch.empty_like(logits).exponential_(generator=generator)
    # A wait may be drawn as exactly 0, whose noise would be infinite.
    return -waits.clamp_min(torch.finfo(waits.dtype).tiny).log()


def gumbel_softmax(logits: Tensor, tau: float, noise: Tensor) -> Tensor:
    """Relaxed one-hot codes (B, K, g, g); the smaller tau, the closer to one-hot."""
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    return F.softmax((logits + noise) / tau, dim=1)


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL of each position's categorical from the uniform one, summed over the grid: (B,).

    Always of the categorical itself, never of the relaxed one (openai/DALL-E issue 26).
    """
    log_q = F.log_softmax(logits, dim=1)
    return (log_q.exp() * (log_q + math.log(logits.shape[1]))).sum(dim=(1, 2, 3))


def code_counts(tokens: Tensor, vocab_size: int) -> Tensor:
    """How often each code occurs: (K,) int64."""
    return torch.bincount(tokens.flatten(), minlength=vocab_size)


def codes_used(counts: Tensor) -> int:
    """Number of codes that occur at all."""
    return int((counts > 0).sum())


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of the codes' frequencies: K if all are equally frequent."""
    p = counts.double() / counts.sum().clamp_min(1)
    return float(torch.special.entr(p).sum().exp())


@torch.no_grad()
def reconstructions(
    model: DVAE, pixels: Tensor, tau: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Pictures to be looked at, each (B, 3, H, W) in [0, 1]: as they are, hard and relaxed."""
    logits = model.logits(pixels)
    codes = gumbel_softmax(logits, tau, gumbel_noise(logits, generator))
    return {
        "original": pixels,
        "hard": model.decode(logits.argmax(dim=1)),
        "relaxed": display_pixels(model.decoder(codes)),
    }


class LossScale:
    """The factor that keeps fp16 gradients from underflowing: one for the whole loss."""

    GROWTH_STEPS = 2000  # this and the start: torch.amp.GradScaler's defaults
    START = 2.0**16

    def __init__(self, precision: str) -> None:
        self.is_used = precision == "fp16"
        self.value = self.START if self.is_used else 1.0
        self.finite_steps = 0

    def update(self, finite: bool) -> None:
        if not self.is_used:
            return
        self.finite_steps = self.finite_steps + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 1.0)
        elif self.finite_steps % self.GROWTH_STEPS == 0:
            self.value *= 2


def _elb(pixels: Tensor, stats: Tensor, logits: Tensor, beta: float) -> ELB:
    channels = pixels[0].numel()
    reconstruction = picture_log_likelihood(pixels, stats).mean() / channels
    kl = kl_to_uniform(logits).mean() / channels
    tokens = logits.detach().argmax(dim=1)
    return ELB(reconstruction=reconstruction, kl=kl, beta=beta, tokens=tokens)
