"""Replicas of the prior: their gradients' means, taken beside the backward pass."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from pipelines.training.checkpoint import Checkpoints
from pipelines.training.gradient_means import GradientMeans
from pipelines.training.prior_trainer import PriorTrainer
from pipelines.training.prior_training import ShardingConfig
from tests.fixtures.ranks import on_ranks
from tests.fixtures.tiny_training import MODEL, tiny_batch, tiny_training, train_tiny, weights_of

REPLICAS = ShardingConfig(group_size=1)
CPU = torch.device("cpu")
UPDATES, SAMPLES = 4, 12


@dataclass
class Watch:
    """Of `dist.all_reduce`: what was begun, and whether it was waited for at once."""

    messages: list[tuple[int, bool]] = field(default_factory=list)

    def over(self, reduce: Callable[..., Any]) -> Callable[..., Any]:
        def watched(tensor: torch.Tensor, async_op: bool = False) -> Any:
            self.messages.append((tensor.numel(), async_op))
            return reduce(tensor, async_op=async_op)

        return watched


def _messages_of_an_update() -> list[tuple[int, bool]]:
    trainer = PriorTrainer(MODEL, tiny_training(sharding=REPLICAS), CPU)
    watch = Watch()
    with patch.object(dist, "all_reduce", watch.over(dist.all_reduce)):
        trainer.update(tiny_batch(0))
    return watch.messages


def test_gradients_leave_in_parts_and_all_else_in_one_message(tmp_path: Path) -> None:
    messages = on_ranks(_messages_of_an_update, 2, tmp_path)
    tokens, *gradients, last = messages
    assert tokens == (1, True)  # of the captions, counted beside the forward pass
    assert [beside for _, beside in gradients] == [True] * len(gradients)
    sizes = [size for size, _ in gradients]
    prior = PriorTrainer(MODEL, tiny_training(), CPU).prior
    total = sum(parameter.numel() for parameter in prior.parameters())
    assert sum(sizes) == total
    largest = max(parameter.numel() for parameter in prior.parameters())
    assert 2 < len(sizes) <= 4
    assert max(sizes) < total / 4 + largest
    # Squares and flags of each block and of what is outside, three losses, and whether to stop.
    assert last == (2 * (MODEL.n_resblocks + 1) + 3 + 1, False)


def _resumed(root: Path, sharding: ShardingConfig, stop_at: int) -> dict[str, Any]:
    """Go on from what is in `root`, if something is, and save after `stop_at` updates."""
    training = tiny_training(sharding=sharding, batch_samples=SAMPLES)
    trainer = PriorTrainer(MODEL, training, CPU)
    losses = []
    with Checkpoints(root, keep=2, settings={}) as checkpoints:
        trainer.resume(checkpoints)
        while trainer.step < stop_at:
            losses.append(trainer.update(tiny_batch(trainer.step, samples=SAMPLES))["loss"])
        trainer.save(checkpoints)
    return {"losses": losses, "weights": weights_of(trainer)}


def _whole_and_resumed(root: Path) -> list[dict[str, Any]]:
    whole = _resumed(root / "whole", REPLICAS, UPDATES)
    _resumed(root / "parts", REPLICAS, 2)
    return [whole, _resumed(root / "parts", REPLICAS, UPDATES)]


def test_three_replicas_resume_in_the_same_bits(tmp_path: Path) -> None:
    # Three, because the order of a sum of two changes nothing.
    whole, resumed = on_ranks(_whole_and_resumed, 3, tmp_path / "ranks", tmp_path)
    assert whole["losses"][2:] == resumed["losses"]
    for name, weight in whole["weights"].items():
        assert torch.equal(weight, resumed["weights"][name]), name


def test_a_training_of_replicas_goes_on_as_shards_and_alone(tmp_path: Path) -> None:
    reference = _resumed(tmp_path / "alone", REPLICAS, UPDATES)["losses"]
    losses = []
    for number, (ranks, sharding) in enumerate(
        [(2, REPLICAS), (2, ShardingConfig(group_size=2)), (1, REPLICAS), (3, REPLICAS)]
    ):
        meeting = tmp_path / f"ranks-{number}"
        arguments = (tmp_path / "turns", sharding, number + 1)
        losses += on_ranks(_resumed, ranks, meeting, *arguments)["losses"]
    assert losses == pytest.approx(reference, rel=1e-5)


def _with_one_that_is_late() -> dict[str, Any]:
    """Rank 1 sends nothing before it has made all of its gradients."""
    training = tiny_training(sharding=REPLICAS)
    if dist.get_rank() == 0:
        return train_tiny(training, UPDATES, batches=UPDATES)
    held: list[Callable[[], Any]] = []
    reduce, finish = dist.all_reduce, GradientMeans.finish

    class Held:
        def wait(self) -> None: ...

    def hold(tensor: torch.Tensor, async_op: bool = False) -> Any:
        if not async_op or tensor.ndim == 0:  # the number of the captions' tokens
            return reduce(tensor, async_op=async_op)
        held.append(lambda: reduce(tensor))
        return Held()

    def release(self: GradientMeans) -> None:
        while held:
            held.pop(0)()
        finish(self)

    with (
        patch.object(dist, "all_reduce", hold),
        patch.object(GradientMeans, "finish", release),
    ):
        return train_tiny(training, UPDATES, batches=UPDATES)


def test_means_are_whole_before_they_are_used(tmp_path: Path) -> None:
    two = on_ranks(_with_one_that_is_late, 2, tmp_path)
    one = train_tiny(tiny_training(), UPDATES, batches=UPDATES)
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-5, atol=0)
    torch.testing.assert_close(two["norms"], one["norms"], rtol=1e-4, atol=0)


def _lacks_a_gradient() -> str:
    used, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
    means = GradientMeans([unused, used], messages=1)
    used.sum().backward()
    with pytest.raises(RuntimeError) as caught:
        means.finish()
    return str(caught.value)


def test_a_parameter_without_a_gradient_is_named_as_missing(tmp_path: Path) -> None:
    assert "got none of 1" in on_ranks(_lacks_a_gradient, 1, tmp_path)
