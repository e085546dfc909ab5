"""What trains the VQ-VAE: the three-term loss, and a codebook of moving averages.

Sources: van den Oord et al., 2017 ("Neural Discrete Representation Learning"), equation 3 and
appendix A.1; Razavi et al., 2019 ("Generating Diverse High-Fidelity Images with VQ-VAE-2"),
section 2.1. Letters: B batch, K codes, D width of a code's vector, g grid side, N = B g g features.

The likelihood is the dVAE's (logit-Laplace), so that the two models' bounds can be compared.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from models.likelihood import picture_log_likelihood
from models.objective import Loss, SumOverRanks
from models.schedules import cosine, linear_warmup
from models.stage_one import StageOne
from models.vqvae import VQVAE

REVIVED_USE = 0.1  # of an equal use: a revived code that attracts nothing is soon dead again


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """How the codebook is learned."""

    codebook: Literal["ema", "gradient"] = "ema"
    """Moving averages of the features nearest to each code (Razavi et al., 2019), or the second
    term of the loss (van den Oord et al., 2017)."""
    commitment: float = 0.25
    """Weight of the third term, which keeps features near their codes (both papers)."""
    decay: float = 0.99
    """Of the moving averages (both papers)."""
    revive_below: float = 0.05
    """A code whose average use falls below this share of an equal use is dead, and is moved onto
    a feature of the batch; 0 leaves the dead alone. Ours: the papers do not say."""

    def __post_init__(self) -> None:
        if self.commitment < 0:
            raise ValueError(f"commitment must be at least 0, got {self.commitment}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")
        if not 0 <= self.revive_below < REVIVED_USE:
            raise ValueError(f"revive_below must be in [0, {REVIVED_USE}), got {self.revive_below}")


@dataclass(frozen=True, kw_only=True)
class VQVAESchedule:
    """The step size: 2e-4 for 250,000 updates (van den Oord et al., 2017, section 4), constant."""

    lr_start: float = 2e-4
    lr_end: float = 2e-4
    lr_steps: int = 250_000
    """Updates from the first to the second, along half a cosine."""
    warmup_steps: int = 0
    """Updates over which the step size rises linearly."""

    def lr(self, step: int) -> float:
        lr = cosine(step, start=self.lr_start, end=self.lr_end, steps=self.lr_steps)
        return lr * linear_warmup(step, self.warmup_steps)


class VQVAEObjective:
    """Reconstruction through the straight-through estimator, and what moves the codebook."""

    def __init__(self, model: VQVAE, config: QuantizerConfig) -> None:
        self.model, self.config = model, config
        self.averages: CodebookAverages | None = None
        if config.codebook == "ema":
            model.codebook.requires_grad_(False)
            self.averages = CodebookAverages(model.codebook.detach(), config)
        self._latest: tuple[Tensor, Tensor] | None = None

    @property
    def warmup_steps(self) -> int:
        """Ten times the memory of the averages."""
        return round(10 / (1 - self.config.decay))

    def loss(self, pixels: Tensor, *, step: int, generator: torch.Generator, report: bool) -> Loss:
        """The terms are means: over the channels of pixels and over the entries of features."""
        features = self.model.features(pixels)
        tokens = self.model.tokens_of(features.detach())
        codes = self.model.vectors(tokens)
        # Straight through: the decoder sees the codes, its gradient passes on to the features.
        stats = self.model.decoder(features + (codes - features).detach())
        channels = pixels[0].numel()
        reconstruction = picture_log_likelihood(pixels, stats) / channels
        codebook = F.mse_loss(codes, features.detach())
        commitment = F.mse_loss(features, codes.detach())
        value = -reconstruction.mean() + self.config.commitment * commitment
        if self.averages is None:
            value = value + codebook
        self._latest = (features.detach(), tokens)
        # The posterior is certain of one code a position: its divergence from uniform is ln K.
        kl = tokens[0].numel() * math.log(self.model.config.vocab_size) / channels
        terms = {
            "hard_elb": reconstruction.detach().mean() - kl,
            "reconstruction": reconstruction.detach().mean(),
            "kl": reconstruction.new_tensor(kl),
            "commitment": commitment.detach(),
        }
        return Loss(
            value=value,
            per_picture=reconstruction.detach(),
            tokens=tokens,
            terms=terms if report else {},
        )

    def settings(self, step: int) -> dict[str, float]:
        return {} if self.averages is None else {"codes_revived": float(self.averages.revived)}

    @torch.no_grad()
    def after_update(
        self, *, generator: torch.Generator, sum_over_ranks: SumOverRanks, is_first: bool
    ) -> None:
        """Move the codebook onto the averages of the features that the update has seen."""
        assert self._latest is not None
        (features, tokens), self._latest = self._latest, None
        if self.averages is None:
            return
        flat = features.permute(0, 2, 3, 1).flatten(0, 2)  # (N, D)
        batch = _sums_by_code(flat, tokens.flatten(), len(self.averages.codebook))
        sum_over_ranks(batch)
        self.averages.update(batch)
        spares = torch.zeros_like(self.averages.codebook)
        if self.averages.dead(batch).any():  # the same on every rank
            if is_first:
                chosen = torch.randint(
                    len(flat), (len(spares),), generator=generator, device=flat.device
                )
                spares = flat[chosen]
            sum_over_ranks(spares)
            self.averages.revive(batch, spares)

    def state(self) -> dict[str, Tensor]:
        return {} if self.averages is None else self.averages.state()

    @torch.no_grad()
    def preview(
        self, model: StageOne, pixels: Tensor, *, step: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """As they are, and through their codes."""
        return {"original": pixels, "hard": model.decode(model.encode(pixels))}


class CodebookAverages:
    """Moving averages of each code's uses and of the features it stood for; writes the codebook.

    They begin at zero: every code is dead, and the first update moves them all onto features.
    """

    def __init__(self, codebook: Tensor, config: QuantizerConfig) -> None:
        self.codebook, self.config = codebook, config
        self.uses = codebook.new_zeros(len(codebook))
        self.sums = torch.zeros_like(codebook)
        self.revived = torch.zeros((), dtype=torch.int64, device=codebook.device)

    def update(self, batch: Tensor) -> None:
        """Take in the sums (K, D) and counts (K, 1) of a batch, as `_sums_by_code` gives them."""
        fresh = 1 - self.config.decay
        self.sums.lerp_(batch[:, :-1], fresh)
        self.uses.lerp_(batch[:, -1], fresh)
        # Where nothing was ever seen there is no average to move to.
        seen = self.uses[:, None] > 0
        self.codebook.copy_(
            torch.where(seen, self.sums / self.uses[:, None].clamp_min(1e-12), self.codebook)
        )

    def dead(self, batch: Tensor) -> Tensor:
        """Which codes are to be moved, (K,) bool."""
        return self.uses < self.config.revive_below * self._equal_use(batch)

    def revive(self, batch: Tensor, spares: Tensor) -> None:
        """Move dead codes onto spare features (K, D), as if they had been used a little."""
        dead, use = self.dead(batch), REVIVED_USE * self._equal_use(batch)
        self.codebook[dead] = spares[dead]
        self.sums[dead] = spares[dead] * use
        self.uses[dead] = use
        self.revived += dead.sum()

    def state(self) -> dict[str, Tensor]:
        return {"uses": self.uses, "sums": self.sums, "revived": self.revived}

    def _equal_use(self, batch: Tensor) -> Tensor:
        return batch[:, -1].sum() / len(self.codebook)


def _sums_by_code(flat: Tensor, tokens: Tensor, vocab_size: int) -> Tensor:
    """(N, D) features of codes (N,) to (K, D + 1): each code's sum, and behind it its count."""
    ones = flat.new_ones(len(flat), 1)
    sums = flat.new_zeros(vocab_size, flat.shape[1] + 1)
    return sums.index_add_(0, tokens, torch.cat((flat, ones), dim=1))
