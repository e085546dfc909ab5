"""PSNR and SSIM against their definitions, written out in float64."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.evaluation.picture_metrics import psnr, ssim

Metric = Callable[[Tensor, Tensor], Tensor]
SIDE = 24


def pictures(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)


def noisy(a: Tensor, spread: float) -> Tensor:
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(1)) * spread
    return (a.float() + noise).round().clamp(0, 255).to(torch.uint8)


def reference_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al., 2004, equation 13 at each place of an 11x11 window, and their mean."""
    x, y = (np.tensordot([0.299, 0.587, 0.114], p.astype(float), axes=1) for p in (a, b))
    r = np.arange(-5, 6)
    window = np.exp(-(r[:, None] ** 2 + r[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for top in range(SIDE - 10):
        for left in range(SIDE - 10):
            p, q = (m[top : top + 11, left : left + 11] for m in (x, y))
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            cov = (window * (p - mp) * (q - mq)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            values.append(
                (2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2))
            )
    return float(np.mean(values))


def test_psnr_is_ten_times_the_logarithm_of_the_peak_over_the_error() -> None:
    a = torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8)
    b = a.clone()
    b[0] = 10  # an error of 100 everywhere
    b[1, 0] = 255  # one of three channels is wrong by the peak
    expected = [10 * math.log10(255**2 / 100), 10 * math.log10(3)]
    torch.testing.assert_close(psnr(a, b), torch.tensor(expected, dtype=torch.float64))


def test_the_psnr_of_equal_pictures_is_finite_and_above_that_of_any_worse_ones() -> None:
    a = pictures(1)
    assert psnr(a, a).item() == pytest.approx(58.92, abs=0.005)
    assert psnr(a, noisy(a, 1.0)).item() < 58


@pytest.mark.parametrize("spread", [2.0, 40.0, 200.0])
def test_ssim_is_what_its_definition_says(spread: float) -> None:
    a = pictures(2)
    b = noisy(a, spread)
    expected = [reference_ssim(p.numpy(), q.numpy()) for p, q in zip(a, b, strict=True)]
    torch.testing.assert_close(ssim(a, b), torch.tensor(expected, dtype=torch.float64))


def test_ssim_is_one_for_equal_pictures_and_falls_with_noise() -> None:
    a = pictures(1)
    assert ssim(a, a).item() == pytest.approx(1.0, abs=1e-12)
    values = [ssim(a, noisy(a, spread)).item() for spread in (1.0, 5.0, 25.0, 125.0)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_a_metric_knows_no_order_and_no_neighbours(metric: Metric) -> None:
    a, b = pictures(3), pictures(3, seed=1)
    torch.testing.assert_close(metric(a, b), metric(b, a))
    alone = torch.cat([metric(a[i : i + 1], b[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(metric(a, b), alone)


def test_other_than_pairs_of_8_bit_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="must be uint8"):
        psnr(pictures(1).float(), pictures(1).float())
    with pytest.raises(ValueError, match=r"must be \(B, 3, H, W\) twice"):
        ssim(pictures(1), pictures(2))
    with pytest.raises(ValueError, match="at least 11 pixels a side"):
        ssim(pictures(1)[..., :8], pictures(1)[..., :8])
