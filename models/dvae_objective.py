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
from models.objective import Loss, SumOverRanks
from models.schedules import cosine, linear_warmup
from models.stage_one import StageOne


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


class DVAEObjective:
    """Minus the relaxed bound, along its schedules."""

    def __init__(self, model: DVAE, schedule: DVAESchedule) -> None:
        self.model, self.schedule = model, schedule

    @property
    def warmup_steps(self) -> int:
        return self.schedule.beta_steps

    def loss(self, pixels: Tensor, *, step: int, generator: torch.Generator, report: bool) -> Loss:
        """With `report`, the bounds with and without relaxation, under the same noise."""
        tau, beta = self.schedule.tau(step), self.schedule.beta(step)
        logits = self.model.logits(pixels)
        noise = gumbel_noise(logits, generator)
        relaxed = elb(pixels, self.model.decoder(gumbel_softmax(logits, tau, noise)), logits, beta)
        terms: dict[str, Tensor] = {}
        if report:
            with torch.no_grad():
                # The limit of the relaxed draw for tau to 0: the gap is the relaxation's alone.
                tokens = (logits + noise).argmax(dim=1)
                hard = elb(pixels, self.model.stats(tokens), logits, beta)
            terms = {
                "relaxed_elb": relaxed.value.detach().mean(),
                "hard_elb": hard.value.mean(),
                "gap": (relaxed.value.detach() - hard.value).mean(),
                "reconstruction": relaxed.reconstruction.detach().mean(),
                "kl": relaxed.kl.detach().mean(),
            }
        return Loss(
            value=-relaxed.value.mean(),
            per_picture=relaxed.value.detach(),
            tokens=logits.detach().argmax(dim=1),
            terms=terms,
        )

    def settings(self, step: int) -> dict[str, float]:
        return {"tau": self.schedule.tau(step), "beta": self.schedule.beta(step)}

    def after_update(
        self, *, generator: torch.Generator, sum_over_ranks: SumOverRanks, is_first: bool
    ) -> None:
        """Nothing: all that the dVAE learns, it learns by gradient."""

    def state(self) -> dict[str, Tensor]:
        return {}

    @torch.no_grad()
    def preview(
        self, model: StageOne, pixels: Tensor, *, step: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """As they are, through their most likely codes, and through relaxed ones."""
        logits = model.features(pixels)
        codes = gumbel_softmax(logits, self.schedule.tau(step), gumbel_noise(logits, generator))
        return {
            "original": pixels,
            "hard": model.decode(model.tokens_of(logits)),
            "relaxed": display_pixels(model.decoder(codes).float()),
        }


@dataclass(frozen=True, kw_only=True)
class ELB:
    """A bound and its two parts for each picture, (B,), in nats per channel of a pixel."""

    reconstruction: Tensor
    """Log density of the pixels given the codes."""
    kl: Tensor
    """Divergence of the codes' distribution from the uniform one."""
    beta: float
    """Weight of the divergence."""

    @property
    def value(self) -> Tensor:
        """The bound itself, to be maximised; a lower bound of ln p only if beta >= 1."""
        return self.reconstruction - self.beta * self.kl


def elb(pixels: Tensor, stats: Tensor, logits: Tensor, beta: float) -> ELB:
    """The bound of pictures (B, 3, S, S), decoded as `stats`, whose codes have these `logits`."""
    channels = pixels[0].numel()
    return ELB(
        reconstruction=picture_log_likelihood(pixels, stats) / channels,
        kl=kl_to_uniform(logits) / channels,
        beta=beta,
    )


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
