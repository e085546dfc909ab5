import math

import pytest
import torch

from models.likelihood import display_pixels, log_density, map_pixels, unmap_pixels


@pytest.mark.parametrize(("mu", "b"), [(0.0, 0.3), (0.7, 0.1), (-2.0, 0.5)])
def test_the_density_integrates_to_one(mu: float, b: float) -> None:
    # Substituting x = sigmoid(t) puts the nodes where the mass is.
    t = torch.linspace(-40, 40, 2_000_001, dtype=torch.float64)
    x = torch.sigmoid(t)
    inside = (x > 0) & (x < 1)
    t, x = t[inside], x[inside]
    density = log_density(x, torch.tensor(mu), torch.tensor(math.log(b), dtype=torch.float64)).exp()
    integral = torch.trapezoid(density * x * (1 - x), t)
    assert float(integral) == pytest.approx(1, abs=1e-6)


def test_the_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    x = map_pixels(torch.rand(20, dtype=torch.float64))
    mu = torch.randn(20, dtype=torch.float64, requires_grad=True)
    ln_b = torch.randn(20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m, s: log_density(x, m, s), (mu, ln_b))


def test_the_gradients_of_a_picture_are_those_of_the_formula() -> None:
    """d ln p / d mu = sign(logit x - mu) / b, d ln p / d ln b = |logit x - mu| / b - 1."""
    torch.manual_seed(0)
    pixels = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    stats = torch.randn(2, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    log_density(map_pixels(pixels), *stats.chunk(2, dim=1)).sum().backward()
    assert stats.grad is not None
    mu, ln_b = stats.detach().chunk(2, dim=1)
    distance = torch.logit(map_pixels(pixels)) - mu
    torch.testing.assert_close(stats.grad[:, :3], distance.sign() / ln_b.exp())
    torch.testing.assert_close(stats.grad[:, 3:], distance.abs() / ln_b.exp() - 1)


def test_the_gradient_of_the_integral_is_zero() -> None:
    """It is 1 for every mu and b, so its numerical integral must not move with them."""
    t = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    x = torch.sigmoid(t)
    mu = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    ln_b = torch.tensor(-0.4, dtype=torch.float64, requires_grad=True)
    inside = (x > 0) & (x < 1)
    density = log_density(x[inside], mu, ln_b).exp() * (x * (1 - x))[inside]
    torch.trapezoid(density, t[inside]).backward()
    assert mu.grad is not None
    assert ln_b.grad is not None
    assert abs(float(mu.grad)) < 1e-3
    assert abs(float(ln_b.grad)) < 1e-3


def test_the_density_is_the_formula_of_the_paper() -> None:
    x, mu, b = 0.3, 0.5, 0.2
    logit = math.log(x / (1 - x))
    expected = math.exp(-abs(logit - mu) / b) / (2 * b * x * (1 - x))
    got = log_density(*(torch.tensor(v, dtype=torch.float64) for v in (x, mu, math.log(b))))
    assert float(got.exp()) == pytest.approx(expected, rel=1e-12)


def test_the_pixel_map_keeps_away_from_the_poles_and_is_undone() -> None:
    pixels = torch.linspace(0, 1, 256)
    mapped = map_pixels(pixels)
    assert float(mapped[0]) == pytest.approx(0.1)
    assert float(mapped[-1]) == pytest.approx(0.9)
    torch.testing.assert_close(unmap_pixels(mapped), pixels)


def test_the_picture_shown_ignores_the_scale() -> None:
    pixels = torch.rand(2, 3, 4, 4)
    stats = torch.cat([torch.logit(map_pixels(pixels)), torch.randn(2, 3, 4, 4)], dim=1)
    torch.testing.assert_close(display_pixels(stats), pixels)
