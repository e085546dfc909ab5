"""PSNR and SSIM of 8-bit pictures against their originals.

Letters: B batch, H and W picture sides.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

PEAK = 255.0
# Rounding to whole levels has this mean squared error: pictures that differ by less are as good as
# equal. It keeps the PSNR of equal pictures finite, at 58.92 dB.
ROUNDING_ERROR = 1 / 12
WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03  # Wang et al., 2004
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Wang et al.'s own code takes it


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB over all channels: (B, 3, H, W) uint8 twice to (B,)."""
    _check(a, b)
    error = (a.double() - b.double()).square().mean(dim=(1, 2, 3)).clamp_min(ROUNDING_ERROR)
    return 10 * torch.log10(PEAK**2 / error)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of the luma: (B, 3, H, W) uint8 twice to (B,), 1 for equal pictures.

    The mean over all places where the whole Gaussian window lies inside the picture.
    """
    _check(a, b)
    if min(a.shape[2:]) < WINDOW:
        raise ValueError(f"pictures must have at least {WINDOW} pixels a side, got {a.shape[2:]}")
    x, y = _luma(a), _luma(b)
    mean_x, mean_y, xx, yy, xy = _blur(torch.cat((x, y, x * x, y * y, x * y), dim=1)).unbind(1)
    var_x, var_y, cov = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    return (likeness / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean(dim=(1, 2))


def _luma(pictures: Tensor) -> Tensor:  # (B, 3, H, W) uint8 -> (B, 1, H, W) float64
    # The variances are differences of squares of up to 255: float32 would leave few digits.
    x = pictures.double()
    return (x * x.new_tensor(LUMA)[:, None, None]).sum(dim=1, keepdim=True)


def _blur(maps: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H - 10, W - 10)
    places = torch.arange(WINDOW, dtype=maps.dtype, device=maps.device) - WINDOW // 2
    weights = torch.softmax(-(places**2) / (2 * SIGMA**2), dim=0)
    channels = maps.shape[1]
    rows = weights.view(1, 1, -1, 1).repeat(channels, 1, 1, 1)
    return F.conv2d(F.conv2d(maps, rows, groups=channels), rows.transpose(2, 3), groups=channels)


def _check(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3:
        raise ValueError(
            f"pictures must be (B, 3, H, W) twice, got {tuple(a.shape)}, {tuple(b.shape)}"
        )
    if a.dtype != torch.uint8 or b.dtype != torch.uint8:
        raise ValueError(f"pictures must be uint8, got {a.dtype}, {b.dtype}")
