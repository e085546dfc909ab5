"""The discrete VAE: its encoder scores the codes, its decoder takes (relaxed) one-hot codes.

Letters: B batch, H and W picture sides, K codes, g grid side.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from models.stage_one import Conv2d, StageOne, StageOneConfig


@dataclass(frozen=True, kw_only=True)
class DVAEConfig(StageOneConfig):
    """Sizes of the dVAE. The defaults are the paper's and the released checkpoint's."""


class DVAE(StageOne):
    """The dVAE of the paper: 53,786,240 + 43,829,766 parameters at its default sizes."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__(config, feature_width=config.vocab_size, code_width=config.vocab_size)

    def logits(self, pixels: Tensor) -> Tensor:  # (B, 3, H, W) in [0, 1] -> (B, K, g, g)
        """Unnormalised log-probabilities of the codes."""
        return self.features(pixels)

    def tokens_of(self, features: Tensor) -> Tensor:  # (B, K, g, g) -> (B, g, g) int64
        """The most likely codes, which the prior is trained on (paper, 2.2)."""
        return features.argmax(dim=1)

    def stats(self, tokens: Tensor) -> Tensor:  # (B, g, g) int64 -> (B, 6, H, W)
        """What the decoder gives for one-hot codes, by looking the codes' vectors up."""
        codebook = self.decoder.blocks.input
        assert isinstance(codebook, Conv2d)
        x = F.embedding(tokens, codebook.w[:, :, 0, 0].t()) + codebook.b  # (B, g, g, n_init)
        stats: Tensor = self.decoder.blocks[1:](x.permute(0, 3, 1, 2))
        return stats
