import math

import pytest
import torch
from torch import Tensor

from models.code_usage import codes_used
from models.likelihood import picture_log_likelihood
from models.vqvae import VQVAE, VQVAEConfig
from models.vqvae_objective import QuantizerConfig, VQVAEObjective, VQVAESchedule

CONFIG = VQVAEConfig(
    image_size=16, vocab_size=12, code_width=5, n_hid=8, n_init=6, n_blk_per_group=1
)


def small_model(seed: int = 0) -> VQVAE:
    torch.manual_seed(seed)
    model = VQVAE(CONFIG)
    torch.nn.init.normal_(model.codebook)
    return model


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def alone(values: Tensor) -> None:
    """The sum over one rank."""


def test_a_feature_becomes_the_code_at_the_least_distance() -> None:
    model = small_model()
    features = torch.randn(3, 5, 2, 2)
    flat = features.permute(0, 2, 3, 1).reshape(-1, 5).double()
    nearest = torch.cdist(flat, model.codebook.detach().double()).argmin(dim=1)
    assert torch.equal(model.tokens_of(features).flatten(), nearest)


def test_pictures_become_a_grid_of_codes_and_come_back() -> None:
    model, pixels = small_model(), torch.rand(2, 3, 16, 16)
    tokens = model.encode(pixels)
    assert tokens.shape == (2, 2, 2)
    assert tokens.dtype == torch.int64
    decoded = model.decode(tokens)
    assert decoded.shape == pixels.shape
    assert 0 <= float(decoded.detach().min()) <= float(decoded.detach().max()) <= 1
    with pytest.raises(ValueError, match="tokens must be 0 to 11"):
        model.decode(torch.full((1, 2, 2), 12))
    with pytest.raises(ValueError, match="multiples of 8"):
        model.encode(torch.rand(1, 3, 20, 16))


def test_the_default_vqvae_fits_the_prior_that_the_dvae_fits() -> None:
    config = VQVAEConfig()
    assert (config.grid, config.vocab_size, config.code_width) == (32, 8192, 64)


def reference_loss(model: VQVAE, pixels: Tensor, commitment: float) -> Tensor:
    """The three terms as the paper writes them, with its stop-gradients."""
    z = model.features(pixels)
    tokens = torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, 5), model.codebook).argmin(dim=1)
    e = model.codebook[tokens].view(len(z), 2, 2, 5).permute(0, 3, 1, 2)
    z_q = z + (e - z).detach()
    log_p = picture_log_likelihood(pixels, model.decoder(z_q)) / (3 * 16 * 16)
    codebook = ((z.detach() - e) ** 2).mean()
    return -log_p.mean() + codebook + commitment * ((z - e.detach()) ** 2).mean()


def test_the_loss_and_its_gradients_are_those_of_the_three_terms() -> None:
    pixels = torch.rand(3, 3, 16, 16)
    ours, theirs = small_model(), small_model()
    objective = VQVAEObjective(ours, QuantizerConfig(codebook="gradient", commitment=0.3))
    loss = objective.loss(pixels, step=0, generator=generator(), report=False).value
    wanted = reference_loss(theirs, pixels, 0.3)
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    wanted.backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, msg=name)


def test_the_decoders_gradient_passes_straight_through_to_the_encoder() -> None:
    model, pixels = small_model(), torch.rand(2, 3, 16, 16)
    objective = VQVAEObjective(model, QuantizerConfig(commitment=0.0))
    objective.loss(pixels, step=0, generator=generator(), report=False).value.backward()
    assert model.codebook.grad is None
    head = model.encoder.blocks.output.conv.w.grad
    assert head is not None
    codes = model.vectors(model.encode(pixels)).detach().requires_grad_()
    (-picture_log_likelihood(pixels, model.decoder(codes)).mean() / (3 * 16 * 16)).backward()
    for parameter in model.parameters():
        parameter.grad = None
    model.features(pixels).backward(codes.grad)
    torch.testing.assert_close(model.encoder.blocks.output.conv.w.grad, head)


def test_the_codebook_follows_the_moving_averages_of_its_features() -> None:
    """Against equations 6 to 8 of van den Oord et al., 2017, appendix A.1, written out."""
    model = small_model()
    objective = VQVAEObjective(model, QuantizerConfig(decay=0.9, revive_below=0))
    uses, sums = [0.0] * 12, [torch.zeros(5) for _ in range(12)]
    codes = [code.clone() for code in model.codebook.detach()]
    for step in range(4):
        pixels = torch.rand(4, 3, 16, 16, generator=generator(step))
        features = model.features(pixels).detach().permute(0, 2, 3, 1).reshape(-1, 5)
        tokens = objective.loss(pixels, step=step, generator=generator(), report=False).tokens
        objective.after_update(generator=generator(), sum_over_ranks=alone, is_first=True)
        for code in range(12):
            mine = features[tokens.flatten() == code]
            uses[code] = 0.9 * uses[code] + 0.1 * len(mine)
            sums[code] = 0.9 * sums[code] + 0.1 * mine.sum(dim=0)
            if uses[code]:
                codes[code] = sums[code] / uses[code]
        torch.testing.assert_close(model.codebook.detach(), torch.stack(codes))


def test_dead_codes_are_moved_onto_features_and_come_into_use() -> None:
    model = small_model()
    torch.nn.init.constant_(model.codebook, 100.0)  # far away: one code would win everything
    objective = VQVAEObjective(model, QuantizerConfig())
    pixels = torch.rand(16, 3, 16, 16)
    first = objective.loss(pixels, step=0, generator=generator(), report=True)
    assert codes_used(torch.bincount(first.tokens.flatten(), minlength=12)) == 1
    features = model.features(pixels).detach().permute(0, 2, 3, 1).reshape(-1, 5)
    objective.after_update(generator=generator(), sum_over_ranks=alone, is_first=True)
    assert objective.settings(0)["codes_revived"] >= 11
    distances = torch.cdist(model.codebook.detach().double(), features.double())
    revived = distances.min(dim=1).values < 1e-6
    assert int(revived.sum()) >= 11
    then = objective.loss(pixels, step=1, generator=generator(), report=True)
    assert codes_used(torch.bincount(then.tokens.flatten(), minlength=12)) >= 6


def test_the_bound_is_that_of_a_certain_code_against_a_uniform_prior() -> None:
    model, pixels = small_model(), torch.rand(2, 3, 16, 16)
    objective = VQVAEObjective(model, QuantizerConfig())
    terms = objective.loss(pixels, step=0, generator=generator(), report=True).terms
    nats = picture_log_likelihood(pixels, model.stats(model.encode(pixels))).mean()
    wanted = (nats - 4 * math.log(12)) / (3 * 16 * 16)
    torch.testing.assert_close(terms["hard_elb"], wanted.detach())


@pytest.mark.parametrize(
    "wrong",
    [{"commitment": -1.0}, {"decay": 1.0}, {"decay": -0.1}, {"revive_below": 1.0}],
)
def test_impossible_quantizers_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        QuantizerConfig(**wrong)  # type: ignore[arg-type]


def test_a_code_has_at_least_one_number() -> None:
    with pytest.raises(ValueError, match="code_width"):
        VQVAEConfig(code_width=0)


def test_the_step_size_stays_where_the_paper_has_it() -> None:
    assert {VQVAESchedule().lr(step) for step in (0, 1, 1000, 250_000, 10**7)} == {2e-4}
