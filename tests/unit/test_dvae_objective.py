import math

import pytest
import torch

from models.code_usage import code_counts, codes_used, perplexity
from models.dvae import DVAE, DVAEConfig
from models.dvae_objective import (
    DVAEObjective,
    DVAESchedule,
    gumbel_noise,
    gumbel_softmax,
    kl_to_uniform,
)
from models.likelihood import picture_log_likelihood
from models.objective import Loss


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_model() -> DVAE:
    torch.manual_seed(0)
    return DVAE(DVAEConfig(image_size=16, vocab_size=12, n_hid=8, n_init=6, n_blk_per_group=1))


def loss_of(model: DVAE, pixels: torch.Tensor, *, tau: float, beta: float) -> Loss:
    schedule = DVAESchedule(tau_start=tau, tau_end=tau, beta_start=beta, beta_end=beta)
    objective = DVAEObjective(model, schedule)
    return objective.loss(pixels, step=0, generator=generator(), report=True)


def test_the_relaxed_bound_meets_the_hard_one_as_tau_falls() -> None:
    model, pixels = small_model(), torch.rand(4, 3, 16, 16)
    gaps = []
    for tau in (1.0, 1 / 16, 1e-4):
        terms = loss_of(model, pixels, tau=tau, beta=1.0).terms
        assert float(terms["gap"]) == pytest.approx(
            float(terms["relaxed_elb"] - terms["hard_elb"]), abs=1e-6
        )
        gaps.append(abs(float(terms["gap"])))
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-5


def test_the_bound_is_per_channel_of_a_pixel() -> None:
    model, pixels = small_model(), torch.rand(4, 3, 16, 16)
    loss = loss_of(model, pixels, tau=0.5, beta=6.6)
    logits = model.logits(pixels)
    codes = gumbel_softmax(logits, 0.5, gumbel_noise(logits, generator()))
    nats = picture_log_likelihood(pixels, model.decoder(codes)) - 6.6 * kl_to_uniform(logits)
    torch.testing.assert_close(loss.value, -nats.mean() / (16 * 16 * 3))
    torch.testing.assert_close(loss.per_picture, nats.detach() / (16 * 16 * 3))
    assert torch.equal(loss.tokens, logits.argmax(dim=1))


def test_the_hard_bound_is_that_of_codes_drawn_from_the_encoder() -> None:
    model, pixels = small_model(), torch.rand(2, 3, 16, 16)
    logits = model.logits(pixels)
    tokens = (logits + gumbel_noise(logits, generator())).argmax(dim=1)
    nats = picture_log_likelihood(pixels, model.stats(tokens)) - 2.0 * kl_to_uniform(logits)
    hard = loss_of(model, pixels, tau=0.5, beta=2.0).terms["hard_elb"]
    torch.testing.assert_close(hard, nats.detach().mean() / (16 * 16 * 3))


def test_the_divergence_pulls_on_the_unrelaxed_distribution() -> None:
    """Its gradient must not depend on the temperature (openai/DALL-E issue 26)."""
    logits = torch.randn(2, 12, 2, 2, dtype=torch.float64, generator=generator(3))
    logits.requires_grad_()
    assert torch.autograd.gradcheck(kl_to_uniform, logits)
    model, pixels = small_model(), torch.rand(2, 3, 16, 16)
    kls = [loss_of(model, pixels, tau=tau, beta=1.0).terms["kl"] for tau in (1.0, 1 / 16)]
    assert torch.equal(*kls)


def test_equal_generators_give_equal_noise_and_others_do_not() -> None:
    logits = torch.zeros(2, 12, 2, 2)
    assert torch.equal(gumbel_noise(logits, generator(1)), gumbel_noise(logits, generator(1)))
    assert not torch.equal(gumbel_noise(logits, generator(1)), gumbel_noise(logits, generator(2)))


def test_the_largest_noisy_logit_is_a_draw_from_the_categorical() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0]).view(1, 3, 1, 1).expand(20_000, 3, 1, 1)
    noisy = logits + gumbel_noise(logits, generator())
    counts = code_counts(noisy.argmax(dim=1), 3) / 20_000
    torch.testing.assert_close(counts, logits[0].flatten().softmax(0), atol=0.01, rtol=0)


def test_the_divergence_is_zero_for_uniform_and_ln_k_for_certain_codes() -> None:
    uniform = torch.zeros(1, 12, 2, 2)
    certain = torch.zeros(1, 12, 2, 2)
    certain[:, 3] = 100
    assert float(kl_to_uniform(uniform)) == pytest.approx(0, abs=1e-6)
    assert float(kl_to_uniform(certain)) == pytest.approx(4 * math.log(12), rel=1e-6)


def test_usage_and_perplexity_count_codes() -> None:
    counts = code_counts(torch.tensor([[0, 0], [3, 3]]), 8)
    assert codes_used(counts) == 2
    assert perplexity(counts) == pytest.approx(2)
    assert perplexity(code_counts(torch.arange(8), 8)) == pytest.approx(8)
