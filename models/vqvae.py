"""The VQ-VAE (van den Oord et al., 2017): the nearest vector of a codebook stands for a feature.

Encoder and decoder are the dVAE's, between them lies a codebook in place of the relaxation.
Letters: B batch, H and W picture sides, K codes, D width of a code's vector, g grid side.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.stage_one import StageOne, StageOneConfig


@dataclass(frozen=True, kw_only=True)
class VQVAEConfig(StageOneConfig):
    """Sizes of the VQ-VAE. The defaults are the dVAE's, which the prior is made for."""

    code_width: int = 64
    """Width of a code's vector (van den Oord et al., 2017, and Razavi et al., 2019)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.code_width < 1:
            raise ValueError(f"code_width must be at least 1, got {self.code_width}")


class VQVAE(StageOne):
    """Pictures to the grid of their features' nearest codes, and back."""

    config: VQVAEConfig

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__(config, feature_width=config.code_width, code_width=config.code_width)
        self.codebook = nn.Parameter(torch.empty(config.vocab_size, config.code_width))
        self.init_codebook()

    @torch.no_grad()
    def init_codebook(self) -> None:
        """Uniform in ±1/K, near the features' mean (the authors' released code)."""
        nn.init.uniform_(self.codebook, -1 / len(self.codebook), 1 / len(self.codebook))

    def tokens_of(self, features: Tensor) -> Tensor:  # (B, D, g, g) -> (B, g, g) int64
        """The codes whose vectors are nearest to the features."""
        # Half precision would confuse neighbours.
        with torch.autocast(features.device.type, enabled=False):
            flat = features.float().permute(0, 2, 3, 1)  # (B, g, g, D)
            # |z - e|² without |z|², which is the same for every code.
            scores = flat @ self.codebook.t() - self.codebook.square().sum(dim=1) / 2
        return scores.argmax(dim=-1)

    def vectors(self, tokens: Tensor) -> Tensor:  # (B, g, g) int64 -> (B, D, g, g)
        """The codes' vectors."""
        return F.embedding(tokens, self.codebook).permute(0, 3, 1, 2)

    def stats(self, tokens: Tensor) -> Tensor:  # (B, g, g) int64 -> (B, 6, H, W)
        stats: Tensor = self.decoder(self.vectors(tokens))
        return stats
