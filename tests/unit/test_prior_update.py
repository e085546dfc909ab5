"""One update of the prior: what it waits for, what it skips, and updates in the backward pass."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.averaging import AveragingConfig
from models.resblock_scaling import ResblockScalingConfig
from pipelines.training.backward_updates import BackwardUpdates
from pipelines.training.gradient_norms import parameter_blocks, squared_norms
from pipelines.training.parallelize import local, resblock_gradients
from pipelines.training.prior_trainer import PriorTrainer
from pipelines.training.prior_training import PriorOptimizerConfig, PriorTraining
from pipelines.training.token_loader import TokenBatch
from tests.fixtures.ranks import run_ranks
from tests.unit.test_prior_training import MODEL, STEPS, Batches, Killed, run, same, training

CPU = torch.device("cpu")


def optimizer(**overrides: Any) -> PriorOptimizerConfig:
    values: dict[str, Any] = {"peak_lr": 1e-2, "warmup_steps": 2, "decay": "cosine"}
    return PriorOptimizerConfig(**(values | overrides))


def in_backward(**overrides: Any) -> PriorOptimizerConfig:
    return optimizer(step="in_backward", clip_norm=0.0, **overrides)


def poison(trainer: PriorTrainer, name: str) -> None:
    trainer.prior.get_parameter(name).register_hook(lambda gradient: gradient * float("inf"))


def weights(trainer: PriorTrainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.prior.named_parameters()}


# --- waiting for the device -------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts the operators that a GPU's host would wait for."""

    SYNCHRONOUS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in self.SYNCHRONOUS:
            self.seen[name] += 1
        if name == "aten::index.Tensor" and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        ):
            self.seen["boolean index"] += 1
        return func(*args, **(kwargs or {}))


def waits(monkeypatch: pytest.MonkeyPatch, how: PriorTraining, n_layers: int) -> Counter[str]:
    trainer = PriorTrainer(replace(MODEL, n_layers=n_layers), how, CPU)
    tolist = torch.Tensor.tolist
    mode = Waits()

    def counted(tensor: Tensor) -> Any:
        mode.seen["tolist"] += 1
        return tolist(tensor)

    trainer.update(Batches().batch(0))  # masks and the like are made once
    with monkeypatch.context() as patched, mode:
        patched.setattr(torch.Tensor, "tolist", counted)
        trainer.update(Batches().batch(1))
    return mode.seen


@pytest.mark.parametrize("moments", ["fp32", "paper"])
@pytest.mark.parametrize("step", ["after", "in_backward"])
def test_an_update_waits_for_the_device_once_whatever_the_number_of_blocks(
    monkeypatch: pytest.MonkeyPatch, step: str, moments: Any
) -> None:
    chosen = {"after": optimizer, "in_backward": in_backward}[step](moments=moments)
    scaled = training(optimizer=chosen)
    seen = waits(monkeypatch, scaled, n_layers=2)
    assert seen["tolist"] == 1
    # The tokens' look at themselves, which is for CPUs only, and the choice of the caption's slots.
    assert seen["aten::_local_scalar_dense"] == 4
    assert waits(monkeypatch, scaled, n_layers=5) == seen
    assert waits(monkeypatch, replace(scaled, resblock_scaling="never"), n_layers=2) == seen


# --- norms and flags --------------------------------------------------------------------------


def test_norms_by_block_make_up_the_global_norm() -> None:
    trainer = PriorTrainer(MODEL, training(), CPU)
    trainer._backward(Batches().batch(0))
    trainer.scales.unscale_(resblock_gradients(trainer.prior))
    squares = squared_norms(trainer.updates.blocks)
    assert len(squares) == MODEL.n_resblocks + 1
    wanted = torch.nn.utils.get_total_norm([p.grad for p in trainer.prior.parameters()])  # type: ignore[misc]
    torch.testing.assert_close(squares.sum().sqrt(), wanted)
    first = [p.grad for p in trainer.prior.resblocks[0].parameters()]
    torch.testing.assert_close(squares[0].sqrt(), torch.nn.utils.get_total_norm(first))  # type: ignore[arg-type]


def test_gradients_above_the_largest_norm_are_clipped_to_it() -> None:
    moved = {}
    for largest in (0.0, 1e9, 1e-4):
        how = training(optimizer=optimizer(clip_norm=largest, epsilon=1.0, moments="fp32"))
        trainer = PriorTrainer(MODEL, how, CPU)
        before = weights(trainer)
        norm = trainer.update(Batches().batch(0))["grad_norm"]
        assert norm > 0.1
        name = "text_embedding.weight"  # without weight decay, and with such an epsilon linear
        moved[largest] = float((weights(trainer)[name] - before[name]).norm())
    assert moved[0.0] == moved[1e9]
    assert moved[1e-4] / moved[0.0] == pytest.approx(1e-4 / norm, rel=0.02)


def test_a_record_counts_overflows_since_the_last_one() -> None:
    trainer = PriorTrainer(MODEL, training(), CPU)
    poison(trainer, "resblocks.1.c_fc.weight")
    for step in range(3):
        trainer.update(Batches().batch(step))
    record = trainer.block_record()
    assert record.step == 3
    assert record.overflows.tolist() == [0, 3, 0, 0]
    assert record.scales[1] < record.scales[0]
    assert (record.norms[[0, 2, 3]] > 0).all()
    assert trainer.block_record().overflows.tolist() == [0, 0, 0, 0]


HALF = training(precision="fp16", optimizer=optimizer(moments="paper"))


def _one_shard_overflows(rank: int, path: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path / 'store'}", rank=rank, world_size=2)
    trainer = PriorTrainer(MODEL, HALF, CPU)
    loader = Batches(rank, 2)
    norm = trainer.update(loader.batch(0))["grad_norm"]
    before = {name: local(value).clone() for name, value in weights(trainer).items()}
    parameter = trainer.prior.resblocks[2].attn.c_attn.weight

    backward = trainer._backward

    def overflow(batch: TokenBatch) -> Tensor:
        """After the reduce-scatter, in one rank's shard only."""
        losses = backward(batch)
        if rank == 1:
            local(parameter.grad).view(-1)[0] = float("inf")  # type: ignore[arg-type]
        return losses

    trainer._backward = overflow  # type: ignore[method-assign]
    metrics = trainer.update(loader.batch(1))
    after = {name: local(value).clone() for name, value in weights(trainer).items()}
    torch.save(
        {
            "norm": norm,
            "skipped": metrics["skipped_updates"],
            "scales": trainer.scales.values,
            "moved": [name for name in after if not torch.equal(after[name], before[name])],
            "record": trainer.block_record().overflows.tolist(),
        },
        path / f"{rank}.pt",
    )
    dist.destroy_process_group()


def test_an_overflow_in_one_rank_s_shard_skips_the_update_of_all(tmp_path: Path) -> None:
    run_ranks(_one_shard_overflows, (tmp_path,), 2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    single = PriorTrainer(MODEL, HALF, CPU).update(Batches().batch(0))
    assert one["norm"] == pytest.approx(single["grad_norm"], rel=1e-3)
    for told in (one, other):
        assert told["skipped"] == 1
        assert told["moved"] == []
        assert told["record"] == [0, 0, 1, 0]
        assert (told["scales"] < 2.0**13).tolist() == [False, False, True, False]
    assert torch.equal(one["scales"], other["scales"])


# --- resuming ---------------------------------------------------------------------------------

STATES = {
    "paper": training(optimizer=optimizer()),
    "bf16": training(optimizer=optimizer(moments="bf16")),
    "split": training(
        optimizer=optimizer(master="split"),
        precision="bf16",
        averaging=AveragingConfig(decay=0.5, every=2, keep_on="host"),
    ),
    "in_backward": training(
        optimizer=in_backward(master="split"), precision="bf16", recompute="full"
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_a_training_with_16_bit_state_resumes_in_the_same_bits(tmp_path: Path, name: str) -> None:
    how = STATES[name]
    whole = run(tmp_path / "whole", how=how)
    with pytest.raises(Killed):
        run(tmp_path / "killed", how=how, kill_at=5)
    resumed = run(tmp_path / "killed", how=how)
    assert resumed["resumed"][0][0] == 4
    assert same(whole["weights"], resumed["weights"])
    assert all(value.dtype == torch.float32 for value in whole["weights"].values())
    assert whole["log"][STEPS]["loss"] == resumed["log"][STEPS]["loss"]


# --- updates in the backward pass -------------------------------------------------------------


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("scaling", ["always", "never"])
def test_updates_in_the_backward_pass_are_those_after_it(scaling: Any, recompute: Any) -> None:
    ends = []
    for chosen in (optimizer(clip_norm=0.0), in_backward()):
        how = training(optimizer=chosen, resblock_scaling=scaling, recompute=recompute)
        trainer = PriorTrainer(MODEL, how, CPU)
        metrics = [trainer.update(Batches().batch(step)) for step in range(4)]
        ends.append((weights(trainer), metrics, trainer.scales.values))
    (after, metrics, scales), (during, other_metrics, other_scales) = ends
    assert same(after, during)
    assert torch.equal(scales, other_scales)
    for one, other in zip(metrics, other_metrics, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_in_the_backward_pass_a_block_that_overflows_is_left_alone_and_no_other() -> None:
    trainer = PriorTrainer(MODEL, training(optimizer=in_backward()), CPU)
    poison(trainer, "resblocks.1.c_fc.weight")
    before = weights(trainer)
    metrics = trainer.update(Batches().batch(0))
    assert metrics["skipped_updates"] == 1
    stayed = {name for name, value in weights(trainer).items() if torch.equal(value, before[name])}
    assert stayed == {name for name in before if name.startswith("resblocks.1.")}
    assert (trainer.scales.values < 2.0**13).tolist() == [False, True, False, False]
    assert trainer.block_record().overflows.tolist() == [0, 1, 0, 0]


def test_in_the_backward_pass_no_two_blocks_have_gradients_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alive: list[int] = []

    class Watched(BackwardUpdates):
        def _update(self, unit: int, parameters: Any) -> None:
            grads = [p.grad for unit in self.units for p in unit if p.grad is not None]
            alive.append(sum(grad.numel() * grad.element_size() for grad in grads))
            super()._update(unit, parameters)

    monkeypatch.setattr("pipelines.training.prior_updates.BackwardUpdates", Watched)
    trainer = PriorTrainer(MODEL, training(optimizer=in_backward(), recompute="full"), CPU)
    trainer.update(Batches().batch(0))
    *resblocks, outside = parameter_blocks(trainer.prior)
    sizes = [sum(4 * p.numel() for p in block) for block in resblocks]
    assert len(alive) == len(resblocks) + len(outside)
    assert max(alive) == max(*sizes, *(4 * p.numel() for p in outside))
    assert all(parameter.grad is None for parameter in trainer.prior.parameters())


def test_a_parameter_without_a_gradient_is_not_passed_over_in_silence() -> None:
    trainer = PriorTrainer(MODEL, training(optimizer=in_backward()), CPU)
    trainer.prior.resblocks[0].ln.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"units \[0\] lack some; set optimizer.step to after"):
        trainer.update(Batches().batch(0))


def test_fp16_scales_find_their_way_down_in_the_backward_pass() -> None:
    scaling = ResblockScalingConfig(initial=2.0**24, patience=1)
    how = training(optimizer=in_backward(), precision="fp16", scaling=scaling)
    trainer = PriorTrainer(MODEL, how, CPU)
    skipped = [trainer.update(Batches().batch(step))["skipped_updates"] for step in range(40)]
    assert skipped[0] == 1
    assert skipped[-1] == skipped[-10]
    assert (trainer.scales.values < 2.0**24).all()
