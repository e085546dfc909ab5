"""Per-resblock gradient scaling: what runs in which precision, and the reasons for it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch
from torch import Tensor, nn

from models import prior as prior_module
from models.linear import Linear
from models.prior import Prior
from models.resblock_scaling import ResblockScales, ResblockScalingConfig
from pipelines.training.parallelize import attach_scales, build_prior, resblock_gradients
from pipelines.training.prior_trainer import PriorTrainer
from pipelines.training.prior_training import PriorOptimizerConfig, Recompute
from tests.unit.test_prior_training import MODEL, Batches, training

CPU = torch.device("cpu")
BLOCKS = MODEL.n_resblocks
WIDE = ResblockScalingConfig(lowest=2.0**-10, highest=2.0**40)
EARLY, LATE = 0, BLOCKS - 1


def scaled_prior(config: ResblockScalingConfig = WIDE) -> tuple[Prior, ResblockScales]:
    prior = Prior(MODEL)
    prior.init_weights(0)
    scales = ResblockScales(BLOCKS, config, CPU)
    attach_scales(prior, scales)
    return prior, scales


def backward(prior: Prior, dtype: torch.dtype = torch.float16) -> None:
    batch = Batches().batch(0)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = prior(batch.text_tokens, batch.image_tokens).total
    loss.backward()


def spread(prior: nn.Module) -> None:
    """Make the first branch's gradients 2^18 times smaller, the last one's 2^14 times larger."""
    with torch.no_grad():
        # Frozen: an update would make it large again.
        prior.get_submodule(f"resblocks.{EARLY}.attn.c_proj").weight.requires_grad_(False)
        prior.get_submodule(f"resblocks.{EARLY}.attn.c_proj").weight.mul_(2.0**-18)
        prior.get_submodule(f"resblocks.{LATE}.c_proj").weight.mul_(2.0**14)
        # The forward pass stays what it is, about: the last branch sees a smaller input.
        prior.get_submodule(f"resblocks.{LATE}.c_fc").weight.mul_(2.0**-12)


# --- precisions -------------------------------------------------------------------------------


@contextmanager
def dtypes_of(prior: Prior) -> Iterator[dict[str, set[torch.dtype]]]:
    """Dtypes of every module's output and of the gradient that arrives at it, by its name."""
    seen: dict[str, set[torch.dtype]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            seen.setdefault(name, set()).add(output.dtype)
            output.register_hook(lambda g: seen.setdefault(f"{name}'", set()).add(g.dtype))

        return hook

    watched = [(n, m) for n, m in prior.named_modules() if n and not isinstance(m, nn.ModuleList)]
    handles = [
        module.register_forward_hook(watch(name))
        for name, module in watched
        if name.count(".") or name == "ln_final"
    ]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_stream_is_fp32_and_the_branches_are_16_bit_both_ways(dtype: torch.dtype) -> None:
    prior, _ = scaled_prior()
    with dtypes_of(prior) as seen:
        backward(prior, dtype)
    for name, dtypes in seen.items():
        is_branch = any(part in name for part in ("attn", "c_fc", "c_proj"))
        assert dtypes == {dtype if is_branch else torch.float32}, name
    assert {"resblocks.0", "resblocks.0'", "resblocks.1.c_fc", "resblocks.1.c_fc'"} <= set(seen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_only_the_matrices_of_the_branches_have_gradients_of_16_bits(dtype: torch.dtype) -> None:
    prior, scales = scaled_prior()
    scales.values.fill_(2.0**13)
    backward(prior, dtype)
    for name, parameter in prior.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        # In fp32 all of them are kept; what was made in 16 bits is known by its values.
        rounded = torch.equal(gradient.to(dtype).float(), gradient)
        is_matrix = name.startswith("resblocks") and parameter.ndim == 2
        assert rounded == is_matrix, name


def test_logits_are_fp32_under_autocast() -> None:
    prior, _ = scaled_prior()
    batch = Batches().batch(0)
    with torch.autocast("cpu", torch.float16):
        for logits in prior.logits(batch.text_tokens, batch.image_tokens):
            assert logits.dtype == torch.float32
            assert not torch.equal(logits.half().float(), logits)


def test_a_bias_s_gradient_may_be_larger_than_16_bits_hold() -> None:
    linear = Linear(4, 3)
    x = torch.zeros(600, 4)
    with torch.autocast("cpu", torch.float16):
        y = linear(x)
    y.backward(torch.full_like(y, 1000.0))
    assert linear.bias.grad is not None
    assert torch.equal(linear.bias.grad, torch.full((3,), 600_000.0))


# --- the reasons ------------------------------------------------------------------------------


def early_gradient(scale: float, dtype: torch.dtype) -> tuple[bool, Tensor]:
    """Whether any block overflows under one scale for all, and the first block's gradient."""
    prior, scales = scaled_prior()
    spread(prior)
    scales.values.fill_(scale)
    backward(prior, dtype)
    flags = scales.unscale_(resblock_gradients(prior))
    gradient = prior.get_submodule(f"resblocks.{EARLY}.attn.c_attn").weight.grad
    assert isinstance(gradient, Tensor)
    return bool(flags.any()), gradient


def test_no_single_loss_scale_keeps_all_blocks_gradients() -> None:
    _, reference = early_gradient(1.0, torch.float32)
    assert (reference != 0).all()
    outcomes = [early_gradient(2.0**exponent, torch.float16) for exponent in range(0, 32, 2)]
    finite = [gradient for overflowed, gradient in outcomes if not overflowed]
    assert finite
    assert len(finite) < len(outcomes)
    for gradient in finite:  # every scale that overflows nowhere loses the first block's
        assert (gradient == 0).float().mean() > 0.6


def learn(scaling: ResblockScalingConfig, precision: str, scales: Tensor | None) -> "Learned":
    """60 updates on one batch."""
    how = training(
        precision=precision,
        scaling=scaling,
        steps=60,
        optimizer=PriorOptimizerConfig(
            # The first block's gradients are smaller than the usual epsilon.
            peak_lr=1e-6,
            warmup_steps=0,
            decay="cosine",
            weight_decay=0.0,
            moments="fp32",
            epsilon=1e-20,
        ),
    )
    trainer = PriorTrainer(MODEL, how, CPU)
    spread(trainer.prior)
    if scales is not None:
        trainer.scales.values.copy_(scales)
    weight = trainer.prior.get_submodule(f"resblocks.{EARLY}.attn.c_attn").weight
    assert isinstance(weight, Tensor)
    before = weight.detach().clone()
    for _ in range(how.steps):
        metrics = trainer.update(Batches().batch(0))
    return Learned(weight.detach() - before, metrics, trainer.scales.values)


class Learned(NamedTuple):
    moved: Tensor
    """What was added to the first block's matrix."""
    metrics: dict[str, float]
    scales: Tensor

    def likeness(self, other: "Learned") -> float:
        return float(torch.cosine_similarity(self.moved.flatten(), other.moved.flatten(), 0))


def test_what_one_loss_scale_cannot_train_resblock_scales_do() -> None:
    reference = learn(ResblockScalingConfig(), "fp32", None)
    # The paper's rule finds the scales, at a pace at which 60 updates do what 10,000 do; then it
    # trains with them.
    fast = ResblockScalingConfig(growth=2.0, patience=1)
    found = learn(fast, "fp16", None).scales / 8
    assert found[EARLY] / found[LATE] > 2**6
    own = learn(ResblockScalingConfig(), "fp16", found)
    # The largest single scale under which no block overflows.
    single = learn(
        ResblockScalingConfig(initial=2.0**8, lowest=2.0**8, highest=2.0**8), "fp16", None
    )
    assert own.metrics["skipped_updates"] == single.metrics["skipped_updates"] == 0
    assert own.likeness(reference) > 0.8
    assert single.likeness(reference) < 0.5
    assert (own.moved == 0).float().mean() < 0.01
    assert (single.moved == 0).float().mean() > 0.4
    assert own.metrics["loss"] == pytest.approx(reference.metrics["loss"], rel=1e-4)


def overflows(monkeypatch: pytest.MonkeyPatch, *, filtered: bool) -> list[bool]:
    """Which blocks overflow if the scale of the last but one is far too high."""
    if not filtered:
        monkeypatch.setattr(prior_module, "UnscaleGradient", Unfiltered)
    prior, scales = scaled_prior()
    scales.values[BLOCKS - 2] = 2.0**40
    backward(prior)
    before = scales.values.clone()
    flags = scales.unscale_(resblock_gradients(prior)) > 0
    scales.move(flags)
    assert torch.equal(scales.values < before, flags)
    return [bool(flag) for flag in flags]


class Unfiltered(torch.autograd.Function):
    """UnscaleGradient as it would be without the filter."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return stream.view_as(stream)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return gradient.float() / scale, None


def test_the_filter_keeps_an_overflow_from_the_blocks_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert overflows(monkeypatch, filtered=True) == [False, False, True, False]
    assert overflows(monkeypatch, filtered=False) == [True, True, True, False]


# --- the rule ---------------------------------------------------------------------------------


def test_a_scale_is_divided_again_after_exactly_its_patience() -> None:
    config = ResblockScalingConfig()
    scales = ResblockScales(2, config, CPU)
    overflowed = torch.tensor([True, False])
    divided = []
    for update in range(2 * config.patience + 1):
        before = float(scales.values[0])
        scales.move(overflowed)
        if float(scales.values[0]) < before:
            divided.append(update)
    assert divided == [0, config.patience, 2 * config.patience]


def test_scales_and_limits_grow_with_the_parts_of_a_batch() -> None:
    config = ResblockScalingConfig()
    scales = ResblockScales(1, config, CPU, parts=4)
    assert float(scales.values) == 4 * config.initial
    scales.values.fill_(1e30)
    scales.move(torch.tensor([False]))
    assert float(scales.values) == 4 * config.highest
    scales.values.fill_(1e-30)
    scales.move(torch.tensor([False]))
    assert float(scales.values) == 4 * config.lowest


def test_gradients_are_divided_by_the_scales_that_they_were_made_with() -> None:
    scales = ResblockScales(3, ResblockScalingConfig(), CPU)
    gradients = [[torch.ones(2)], [torch.tensor([1.0, float("inf")])], [torch.ones(2)]]
    flags = scales.unscale_(gradients)
    assert flags.tolist() == [0.0, 1.0, 0.0]
    assert torch.equal(gradients[0][0], torch.full((2,), 2.0**-13))
    # They move by the flags of all ranks, which the caller has to ask for.
    assert torch.equal(scales.values, torch.full((3,), 2.0**13))


# --- beside recomputation and the compiler ----------------------------------------------------


def test_recomputation_changes_no_bit_of_a_scaled_gradient() -> None:
    gradients = {}
    for recompute in get_args(Recompute):
        prior, _ = build_prior(MODEL, device=CPU, seed=0, recompute=recompute)
        attach_scales(prior, ResblockScales(BLOCKS, WIDE, CPU))
        backward(prior)
        gradients[recompute] = [p.grad for p in prior.parameters()]
    for kept, *recomputed in zip(*gradients.values(), strict=True):
        assert all(torch.equal(kept, other) for other in recomputed)


COMPILED = [(0, "aot_eager"), (1, "aot_eager")]
if shutil.which("g++"):  # attention would compile for 20 seconds
    COMPILED.append((1, "inductor"))


@pytest.mark.parametrize(("block", "backend"), COMPILED)
def test_a_scaled_resblock_compiles_into_one_graph(block: int, backend: str) -> None:
    prior = Prior(replace(MODEL, attention="full"))
    prior.init_weights(0)
    attach_scales(prior, ResblockScales(BLOCKS, WIDE, CPU))
    resblock = prior.resblocks[block]
    torch._dynamo.reset()
    compiled = torch.compile(resblock, fullgraph=True, backend=backend)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, MODEL.stream_len, MODEL.d_model, generator=generator, requires_grad=True)
    arriving = torch.randn(x.shape, generator=generator) * 1e-3
    gradients = []
    for module in (compiled, resblock):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        gradients.append(torch.autograd.grad(y, (x, *resblock.parameters()), arriving))
    for one, other in zip(*gradients, strict=True):
        # GELU is another one under the compiler; both are right to bf16's rounding.
        assert float((one - other).norm()) <= 0.02 * float(other.norm())


def test_the_sparse_attention_of_cpus_is_all_that_breaks_the_graph() -> None:
    prior, _ = scaled_prior()
    x = torch.randn(2, MODEL.stream_len, MODEL.d_model, requires_grad=True)
    for block, resblock in enumerate(prior.resblocks[:2]):
        resblock(x)  # makes the layer's folding, once
        torch._dynamo.reset()
        explained = torch._dynamo.explain(resblock)(x)
        files = {
            Path(frame.filename).name
            for reason in explained.break_reasons
            for frame in reason.user_stack[-1:]
        }
        assert files == ({"sparse_attention.py"} if block % 2 == 0 else set())
