"""AdamW with state of 16 bits a number, against torch's own and against itself."""

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.prior import Prior
from models.sixteen_bit import MEAN, VARIANCE, join, split
from pipelines.training import adamw_rule
from pipelines.training.adamw_rule import Factors, Moments, Rule, State, update_
from pipelines.training.compact_adamw import LOWER_BITS, PIECE, CompactAdamW
from pipelines.training.optimizer import build_optimizer, named_masters
from pipelines.training.prior_training import PriorOptimizerConfig, PriorTraining
from tests.unit.test_prior_training import MODEL

MOMENTS: list[Moments] = ["fp32", "bf16", "paper"]
STEPS = 30


def built(**overrides: Any) -> tuple[Prior, torch.optim.Optimizer]:
    prior = Prior(MODEL)
    prior.init_weights(0)
    return prior, build_optimizer(prior, PriorOptimizerConfig(**overrides))


def fed(prior: Prior, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> dict[str, Tensor]:
    """The fp32 weights after updates with gradients that depend on the step and the name alone."""
    for step in range(steps):
        for index, parameter in enumerate(prior.parameters()):
            generator = torch.Generator().manual_seed(1000 * step + index)
            gradient = torch.randn(parameter.shape, generator=generator) * 1e-3
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return {n: v.clone() for n, v in named_masters(optimizer, prior.named_parameters())}


def errors(one: dict[str, Tensor], other: dict[str, Tensor], start: Prior) -> list[float]:
    """Of what the updates added to each parameter, relative to its norm."""
    before = dict(start.named_parameters())
    return [
        float((one[name] - other[name]).norm() / (other[name] - before[name]).detach().norm())
        for name in other
    ]


def test_in_fp32_it_is_torch_s_adamw_to_rounding() -> None:
    reference = fed(*built(moments="fp32"))
    # In the backward pass or after it, the rule is the same; it makes the optimizer ours.
    prior, optimizer = built(moments="fp32", step="in_backward", clip_norm=0.0)
    assert isinstance(optimizer, CompactAdamW)
    assert max(errors(fed(prior, optimizer), reference, built()[0])) < 2e-6


@pytest.mark.parametrize("moments", MOMENTS)
def test_split_weights_are_fp32_weights_to_the_bit(moments: Moments) -> None:
    whole, in_whole = built(moments=moments, step="in_backward", clip_norm=0.0)
    halves, in_halves = built(moments=moments, master="split")
    for parameter in halves.resblocks.parameters():
        assert parameter.dtype == (torch.bfloat16 if parameter.ndim == 2 else torch.float32)
    start = dict(named_masters(in_halves, halves.named_parameters()))
    assert all(torch.equal(start[name], value) for name, value in whole.named_parameters())
    # Both see gradients of bf16, as split weights have them.
    for step in range(3):
        pairs = zip(whole.parameters(), halves.parameters(), strict=True)
        for index, (one, other) in enumerate(pairs):
            generator = torch.Generator().manual_seed(1000 * step + index)
            gradient = torch.randn(one.shape, generator=generator).to(other.dtype)
            one.grad, other.grad = gradient.float(), gradient
        in_whole.step()
        in_halves.step()
    ends = dict(named_masters(in_halves, halves.named_parameters()))
    assert all(torch.equal(ends[name], value) for name, value in whole.named_parameters())


@pytest.mark.parametrize(("moments", "largest"), [("bf16", 0.005), ("paper", 0.002)])
def test_rounded_moments_move_weights_as_fp32_ones_do(moments: Moments, largest: float) -> None:
    reference = fed(*built(moments="fp32"))
    assert max(errors(fed(*built(moments=moments)), reference, built()[0])) < largest


@pytest.mark.parametrize("moments", MOMENTS)
def test_the_matrices_of_the_resblocks_alone_have_16_bit_state(moments: Moments) -> None:
    prior, optimizer = built(moments=moments, master="split")
    for name, parameter in prior.named_parameters():
        kept = optimizer.state[parameter]
        is_matrix = name.startswith("resblocks.") and parameter.ndim == 2
        wanted = adamw_rule.DTYPES[moments] if is_matrix else torch.float32
        assert kept["exp_avg"].dtype == kept["exp_avg_sq"].dtype == wanted, name
        assert (LOWER_BITS in kept) == is_matrix


def test_split_weights_with_16_bit_moments_take_8_bytes_a_parameter() -> None:
    prior, optimizer = built(moments="paper", master="split")
    for parameter in prior.resblocks.parameters():
        tensors = [parameter, *optimizer.state[parameter].values()]
        size = sum(t.numel() * t.element_size() for t in tensors if t.ndim)
        assert size == (8 if parameter.ndim == 2 else 12) * parameter.numel()


def random_state(moments: Moments, *, halves: bool, size: int = 5000) -> State:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, generator=generator) * 0.02
    mean = torch.randn(size, generator=generator) * 1e-3
    variance = torch.rand(size, generator=generator) * 1e-6
    if moments == "paper":
        mean, variance = MEAN.encode(mean), VARIANCE.encode(variance)
    dtype = adamw_rule.DTYPES[moments]
    upper, lower = split(weight) if halves else (weight, None)
    gradient = torch.randn(size, generator=generator).to(upper.dtype)
    return State(upper, lower, mean.to(dtype), variance.to(dtype), gradient)


def copy(state: State) -> State:
    return State(*(None if tensor is None else tensor.clone() for tensor in state))  # type: ignore[arg-type]


def same(one: State, other: State) -> bool:
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None]
    return all(torch.equal(a, b) for a, b in pairs)  # type: ignore[arg-type]


def rule(moments: Moments) -> Rule:
    return Rule(beta1=0.9, beta2=0.96, epsilon=1e-8, moments=moments)


def factors(unscale: float | None = None, skip: float | None = None) -> Factors:
    numbers = (0.9999, 1e-3, 0.5, unscale, skip)
    return Factors(*(None if n is None else torch.tensor(n) for n in numbers))  # type: ignore[arg-type]


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("moments", MOMENTS)
def test_a_skipped_update_changes_no_bit_whatever_the_gradient(
    moments: Moments, halves: bool
) -> None:
    state = random_state(moments, halves=halves)
    state.gradient[::3] = float("nan")
    state.gradient[1::3] = float("inf")
    before = copy(state)
    update_(state, factors(skip=1.0), rule(moments))
    pairs = zip(before[:4], state[:4], strict=True)
    assert all(a is None or torch.equal(a, b) for a, b in pairs)  # type: ignore[arg-type]
    state.gradient.fill_(1.0)
    update_(state, factors(skip=0.0), rule(moments))
    assert not torch.equal(before.mean, state.mean)


def test_a_scaled_gradient_is_unscaled_first() -> None:
    plain, scaled = (random_state("paper", halves=True) for _ in range(2))
    scaled.gradient.mul_(2.0**13)
    update_(plain, factors(), rule("paper"))
    update_(scaled, factors(unscale=2.0**-13), rule("paper"))
    assert same(plain._replace(gradient=scaled.gradient), scaled)


def test_pieces_are_updated_as_the_whole_is() -> None:
    whole = random_state("paper", halves=True, size=2 * PIECE + 17)
    parts = copy(whole)
    update_(whole, factors(), rule("paper"))
    for piece in parts.pieces(PIECE):
        update_(piece, factors(), rule("paper"))
    assert same(whole, parts)


def test_the_paper_s_variance_is_clipped_before_it_is_used() -> None:
    state = random_state("paper", halves=False)._replace(gradient=torch.full((5000,), 1e4))
    weight = state.weight.clone()
    update_(state, factors(), rule("paper"))
    assert torch.equal(VARIANCE.decode(state.variance), torch.full((5000,), 5.0))
    assert MEAN.decode(state.mean).max() == MEAN.largest  # 1e3, of which the format holds 16
    mean = torch.lerp(MEAN.decode(random_state("paper", halves=False).mean), state.gradient, 0.1)
    torch.testing.assert_close(state.weight, weight * 0.9999 - 1e-3 * mean / 10**0.5)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_the_fused_update_is_the_plain_one_to_rounding() -> None:
    """The code that torch.compile turns into one kernel, Triton's on CUDA, here C++."""
    for size in (5000, 7001):  # one kernel for all sizes
        plain = random_state("paper", halves=True, size=size)
        fused = copy(plain)
        numbers = factors(unscale=0.5, skip=0.0)
        update_(plain, numbers, rule("paper"))
        adamw_rule.fused_update()(fused, numbers, rule("paper"))
        assert plain.lower is not None
        assert fused.lower is not None
        weights = join(fused.weight, fused.lower), join(plain.weight, plain.lower)
        torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-9)
        for form, one, other in (
            (MEAN, fused.mean, plain.mean),
            (VARIANCE, fused.variance, plain.variance),
        ):
            # Rounding in another order may end in the next code, and seldom does.
            assert (one != other).float().mean() < 0.01
            torch.testing.assert_close(form.decode(one), form.decode(other), rtol=0.002, atol=0.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"step": "in_backward"}, "clip_norm must be 0, got 4.0"),
        ({"clip_norm": -1.0}, "clip_norm must be above 0"),
        ({"epsilon": 0.0}, "epsilon above 0"),
        ({"beta2": 1.0}, r"beta1 and beta2 must be in \[0, 1\)"),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PriorOptimizerConfig(**settings)


def test_a_training_names_what_excludes_what() -> None:
    in_backward = PriorOptimizerConfig(step="in_backward", clip_norm=0.0)
    with pytest.raises(ValueError, match="micro_batches must be 1, got 2"):
        PriorTraining(optimizer=in_backward, micro_batches=2)
    halves = PriorOptimizerConfig(master="split")
    with pytest.raises(ValueError, match="precision must be bf16, got fp16"):
        PriorTraining(optimizer=halves)
    PriorTraining(optimizer=halves, precision="bf16").check_workers(1)
    with pytest.raises(ValueError, match="master split is for a training of one worker, got 2"):
        PriorTraining(optimizer=halves, precision="bf16").check_workers(2)
    with pytest.raises(ValueError, match="step in_backward is for a training of one worker"):
        PriorTraining(optimizer=in_backward).check_workers(8)


def test_the_default_is_the_paper_s() -> None:
    config = PriorOptimizerConfig()
    assert (config.beta1, config.beta2, config.epsilon) == (0.9, 0.96, 1e-8)
    assert (config.weight_decay, config.clip_norm, config.warmup_steps) == (4.5e-2, 4.0, 5000)
    assert (config.moments, config.step, config.peak_lr) == ("paper", "after", 4.5e-4)
    assert config.plateau.halvings == 5


def test_a_model_without_gradients_is_left_alone() -> None:
    layer = nn.Linear(2, 2)
    before = layer.weight.detach().clone()
    build_optimizer(layer, PriorOptimizerConfig()).step()
    assert torch.equal(layer.weight, before)
