"""A batch in a process of its own: the same pictures, and what is told when it cannot go on."""

import os
import queue
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from models.prior import Prior
from pipelines.sampling.batch_process import BatchProcess
from pipelines.sampling.batching import Batch
from pipelines.sampling.diagnosis import NonFiniteLogits
from pipelines.sampling.drawing import SamplingConfig
from pipelines.sampling.loading import load_batch
from pipelines.sampling.orders import Drawn, Order
from pipelines.sampling.packing import PackedPrior
from pipelines.sampling.picture_source import TooLate
from pipelines.training.weights import save_model
from tests.fixtures.models import SMALL, prompts, random_prior
from tests.fixtures.processes import descendants
from tests.fixtures.waiting import until

Told = Drawn | Exception


def saved(prior: Prior, file: Path) -> partial[Batch]:
    save_model(file, kind="prior", config=prior.config, state=prior.state_dict(), metadata={})
    return partial(load_batch, file, device="cpu", slots=4, precision="fp32", threads=1)


def order(told: "queue.SimpleQueue[Told]", text: int = 0, **wanted: Any) -> Order:
    fields: dict[str, Any] = {"seeds": [1], "sampling": SamplingConfig()} | wanted
    return Order(text_tokens=prompts(3)[text], tell=told.put, **fields)


@pytest.fixture
def told() -> "queue.SimpleQueue[Told]":
    return queue.SimpleQueue()


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BatchProcess]:
    file = tmp_path_factory.mktemp("model") / "prior.safetensors"
    process = BatchProcess(saved(random_prior(SMALL, spread=0.1), file), lambda: None)
    yield process
    process.close()


def test_it_draws_what_a_batch_here_draws_and_says_how_it_does(
    process: BatchProcess, told: "queue.SimpleQueue[Told]"
) -> None:
    wanted: dict[str, Any] = {"seeds": [3, 4, 5], "moments": frozenset({2}), "shown": 1}
    here, batch = list[Told](), Batch(PackedPrior(random_prior(SMALL, spread=0.1)), 4)
    local = Order(text_tokens=prompts(3)[1], sampling=SamplingConfig(), tell=here.append, **wanted)
    batch.add(local)
    while not batch.idle:
        batch.step()
    process.add(order(told, 1, **wanted))
    there = [told.get(timeout=60) for _ in here]
    assert len(here) == 4  # a partial picture and three whole ones
    for mine, other in zip(there, here, strict=True):
        assert isinstance(mine, Drawn)
        assert isinstance(other, Drawn)
        assert (mine.index, mine.rows) == (other.index, other.rows)
        assert mine.tokens.tolist() == other.tokens.tolist()
    load = process.load()
    assert (load.slots, load.busy, load.waiting) == (4, 0, 0)
    assert load.drawn >= 3 * SMALL.image_len


def test_whoever_is_dropped_is_told_nothing_and_his_slots_are_free(
    process: BatchProcess, told: "queue.SimpleQueue[Told]"
) -> None:
    left = order(told, seeds=[*range(400)])
    process.add(left)
    process.drop(left)
    process.drop(left)  # nothing happens
    until(lambda: process.load().busy == process.load().waiting == 0)
    while not told.empty():  # what was drawn before it was dropped
        assert isinstance(told.get(), Drawn)


@pytest.mark.parametrize(
    ("wanted", "kind"),
    [({"seeds": []}, ValueError), ({"deadline": 0.0}, TooLate)],
)
def test_an_order_that_cannot_be_drawn_is_told_so(
    process: BatchProcess, told: "queue.SimpleQueue[Told]", wanted: dict[str, Any], kind: type
) -> None:
    process.add(order(told, **wanted))
    assert isinstance(told.get(timeout=60), kind)
    process.add(order(told))
    assert isinstance(told.get(timeout=60), Drawn)


def test_logits_that_are_not_finite_are_the_orders_affair_and_closing_is_no_death(
    told: "queue.SimpleQueue[Told]", tmp_path: Path
) -> None:
    prior, ended = random_prior(SMALL), list[bool]()
    prior.image_head.bias.data.fill_(float("nan"))
    make = saved(prior, tmp_path / "prior.safetensors")
    process = BatchProcess(make, lambda: ended.append(True))
    process.add(order(told))
    error = told.get(timeout=60)
    assert isinstance(error, NonFiniteLogits)
    assert "must be finite" in str(error)
    assert process.load().busy == 0
    process.close()
    assert process.pid not in descendants(os.getpid())
    assert not ended
    assert process.error is None


def test_what_keeps_it_from_being_made_is_raised_here(tmp_path: Path) -> None:
    file = tmp_path / "prior.safetensors"
    make = saved(random_prior(SMALL), file)
    file.unlink()
    with pytest.raises(ValueError, match="must be a prior model file, but there is none"):
        BatchProcess(make, lambda: None)
    with pytest.raises(RuntimeError, match="ended with 3"):
        BatchProcess(partial(os._exit, 3), lambda: None)


def test_its_death_is_told_to_all_and_then_to_its_owner(
    told: "queue.SimpleQueue[Told]", tmp_path: Path
) -> None:
    ended, make = list[bool](), saved(random_prior(SMALL), tmp_path / "prior.safetensors")
    process = BatchProcess(make, lambda: ended.append(True))
    process.add(order(told, seeds=[*range(4000)]))
    assert isinstance(told.get(timeout=60), Drawn)
    assert process.pid in descendants(os.getpid())
    os.kill(process.pid, signal.SIGKILL)
    until(lambda: ended)
    while isinstance(last := told.get(timeout=60), Drawn):
        pass
    assert "ended with -9" in str(last)
    assert process.error is last
    with pytest.raises(RuntimeError, match="ended with -9"):
        process.load()
    process.add(order(told))
    assert told.get(timeout=60) is last
