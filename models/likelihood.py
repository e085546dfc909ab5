"""The logit-Laplace likelihood of pixels (paper, section 2.1 and appendix A.3).

A pixel x in [0, 1] is mapped into (0, 1) away from the ends; there its density is that of a
Laplace variable after a logistic squash. Letters: B batch, H and W picture sides.
"""

import math

import torch
from torch import Tensor

EPSILON = 0.1  # paper, appendix A.3: [0, 255] is mapped to [0.1, 0.9]


def map_pixels(pixels: Tensor) -> Tensor:
    """[0, 1] to [EPSILON, 1 - EPSILON], where the density has no poles."""
    return (1 - 2 * EPSILON) * pixels + EPSILON


def unmap_pixels(mapped: Tensor) -> Tensor:
    """The inverse of `map_pixels`, clamped to [0, 1]."""
    return ((mapped - EPSILON) / (1 - 2 * EPSILON)).clamp(0, 1)


def log_density(mapped: Tensor, mu: Tensor, ln_b: Tensor) -> Tensor:
    """ln of 1 / (2 b x (1 - x)) exp(-|logit(x) - mu| / b), elementwise, in nats.

    `mapped` must lie strictly between 0 and 1; all three broadcast.
    """
    jacobian = torch.log(mapped) + torch.log1p(-mapped)
    distance = (torch.logit(mapped) - mu).abs() * torch.exp(-ln_b)
    return -distance - ln_b - math.log(2) - jacobian


def picture_log_likelihood(pixels: Tensor, stats: Tensor) -> Tensor:
    """Log density of whole pictures, in nats: (B, 3, H, W) and (B, 6, H, W) to (B,).

    The first three maps of `stats` are mu, the others ln b. Computed in fp32.
    """
    mu, ln_b = stats.float().chunk(2, dim=1)
    return log_density(map_pixels(pixels), mu, ln_b).sum(dim=(1, 2, 3))


def display_pixels(stats: Tensor) -> Tensor:
    """The picture to show for (B, 6, H, W): ln b is ignored (released code)."""
    return unmap_pixels(torch.sigmoid(stats[:, :3]))
