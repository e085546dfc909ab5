"""Continuous batching against the sampler of one request at a time, and against itself."""

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.prior import Prior, PriorConfig
from pipelines.sampling.batching import Batch
from pipelines.sampling.diagnosis import NonFiniteLogits
from pipelines.sampling.drawing import SamplingConfig
from pipelines.sampling.image_tokens import sample_image_tokens
from pipelines.sampling.orders import Drawn, Order
from pipelines.sampling.packing import PackedPrior
from pipelines.sampling.partial_pictures import moments
from pipelines.sampling.picture_source import TooLate
from tests.fixtures.models import TINY, prompts, random_prior

GUIDED = SamplingConfig(cond_scale=2.5)
KINDS = (
    SamplingConfig(),
    SamplingConfig(temperature=0.7, top_k=20),
    SamplingConfig(top_p=0.8),
    GUIDED,
)


@pytest.fixture(scope="module")
def prior() -> Prior:
    return random_prior(TINY, spread=0.1)


@pytest.fixture(scope="module")
def packed(prior: Prior) -> PackedPrior:
    return PackedPrior(prior)


class Asked:
    """An order and what came of it."""

    def __init__(self, seeds: list[int], text: Tensor, **wanted: Any) -> None:
        self.told: list[Drawn | Exception] = []
        wanted = {"sampling": SamplingConfig()} | wanted
        self.order = Order(text_tokens=text, seeds=seeds, tell=self.told.append, **wanted)

    def pictures(self) -> dict[int, list[int]]:
        """The tokens of every whole picture by its seed."""
        return {
            self.order.seeds[told.index]: told.tokens.tolist()
            for told in self.told
            if isinstance(told, Drawn) and told.rows == TINY.grid
        }

    @property
    def done(self) -> bool:
        return len(self.pictures()) == len(self.order.seeds)


def finish(batch: Batch) -> None:
    while not batch.idle:
        batch.step()
    assert batch.busy_slots == 0


def alone(packed: PackedPrior, asked: Asked) -> dict[int, list[int]]:
    """The same order in a batch of its own, one picture at a time."""
    order = asked.order
    result: dict[int, list[int]] = {}
    for seed in order.seeds:
        again = Asked([seed], order.text_tokens, sampling=order.sampling, primed=order.primed)
        batch = Batch(packed, 2)
        batch.add(again.order)
        finish(batch)
        result |= again.pictures()
    return result


@pytest.mark.parametrize("sampling", KINDS)
@pytest.mark.parametrize("given_rows", [0, 3])
def test_pictures_are_the_samplers(
    packed: PackedPrior, sampling: SamplingConfig, given_rows: int
) -> None:
    text = prompts(1, TINY)
    primed = torch.arange(given_rows * TINY.grid) % TINY.image_vocab_size
    wanted = sample_image_tokens(
        packed, text, candidates=5, seeds=range(5), sampling=sampling, primed=primed[None]
    )
    asked = Asked([*range(5)], text[0], sampling=sampling, primed=primed)
    batch = Batch(packed, 4)
    batch.add(asked.order)
    finish(batch)
    assert asked.pictures() == dict(enumerate(wanted.tolist()))


def six() -> list[Asked]:
    texts = prompts(6, TINY)
    return [
        Asked([*range(10 * n, 10 * n + 1 + n % 3)], texts[n], sampling=KINDS[n % len(KINDS)])
        for n in range(6)
    ]


@pytest.fixture(scope="module")
def six_alone(packed: PackedPrior) -> list[dict[int, list[int]]]:
    return [alone(packed, asked) for asked in six()]


@pytest.mark.parametrize("slots", [2, 5, 16])
def test_a_picture_is_the_same_in_any_batch_whenever_it_joins(
    packed: PackedPrior, six_alone: list[dict[int, list[int]]], slots: int
) -> None:
    orders, chance = six(), random.Random(slots)
    batch, waiting = Batch(packed, slots), [*orders]
    while waiting or not batch.idle:
        if waiting and chance.random() < 0.2:
            batch.add(waiting.pop().order)
        batch.step()
    assert [asked.pictures() for asked in orders] == six_alone


# Sums over 2,048 numbers, which oneDNN cuts into parts where there is one row.
WIDE = dataclasses.replace(TINY, n_layers=2, d_model=512, n_heads=8, grid=4)


@pytest.mark.parametrize(("config", "packs"), [(TINY, True), (TINY, False), (WIDE, True)])
def test_logits_are_equal_to_the_last_bit_whoever_else_is_there(
    config: PriorConfig, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Either library, whichever would be chosen here.
    if packs:
        monkeypatch.setattr("pipelines.sampling.packing.mkl_is_faster", lambda: False)
    else:
        monkeypatch.setattr("pipelines.sampling.packing.can_pack", lambda *_: False)
    packed, texts = PackedPrior(random_prior(config, spread=0.02)), prompts(16, config)
    seen: list[list[Tensor]] = []
    for count in (1, 2, 3, 4, 7, 16):
        batch, logits = Batch(packed, 16), []
        for text in texts[:count]:
            batch.add(Asked([3], text).order)
        while not batch.idle:
            batch.step()
            logits.append(batch._logits[0].clone())
        seen.append(logits)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0][:-1], other[:-1], strict=True))


def test_a_late_order_joins_in_the_middle_and_a_long_one_yields(packed: PackedPrior) -> None:
    text, batch = prompts(1, TINY)[0], Batch(packed, 4)
    pool = Asked([*range(40)], text)
    batch.add(pool.order)
    batch.step()
    assert batch.busy_slots == 4
    late = Asked([100], text)
    batch.add(late.order)
    while not late.done:
        batch.step()
    # The pool's first four had to end, then the late one was next.
    assert batch.steps == 2 * TINY.image_len
    assert len(pool.pictures()) == 7
    finish(batch)
    assert pool.done


def test_small_orders_do_not_keep_a_pool_from_its_quarter(packed: PackedPrior) -> None:
    text, batch = prompts(1, TINY)[0], Batch(packed, 4)
    for seed in range(8):
        batch.add(Asked([seed], text).order)
    pool = Asked([*range(20)], text)
    batch.add(pool.order)
    while not pool.pictures():
        for seed in range(4):  # more of them than there are slots, at every step
            batch.add(Asked([seed], text).order)
        batch.step()
    assert batch.steps <= 3 * TINY.image_len


def test_partial_pictures_are_told_at_their_moments(packed: PackedPrior) -> None:
    asked = Asked([5, 6, 7], prompts(1, TINY)[0], moments=frozenset({2, 4}), shown=2)
    batch = Batch(packed, 8)
    batch.add(asked.order)
    finish(batch)
    told = [(told.index, told.rows) for told in asked.told if isinstance(told, Drawn)]
    assert told == [(0, 2), (1, 2), (0, 4), (1, 4), (0, 8), (1, 8), (2, 8)]
    whole = asked.pictures()
    for part in asked.told:
        assert isinstance(part, Drawn)
        assert part.tokens.tolist() == whole[5 + part.index][: part.rows * TINY.grid]


@pytest.mark.parametrize(("start", "grid"), [(0, 8), (0, 32), (3, 8), (7, 8), (8, 8), (0, 1)])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_the_first_partial_picture_comes_early(start: int, grid: int, count: int) -> None:
    rows = moments(start, grid, count)
    assert rows == sorted(set(rows))
    assert len(rows) == min(count, max(0, grid - start - 1))
    assert all(start < each < grid for each in rows)
    if rows and grid - start >= 5:
        assert rows[0] - start <= 0.3 * (grid - start)


def test_when_many_draw_the_next_ones_begin_together_and_soon(packed: PackedPrior) -> None:
    """A free slot waits for a row at most; with few at work nobody waits."""
    text, batch = prompts(1, TINY)[0], Batch(packed, 8)
    for seed in range(3):
        batch.add(Asked([seed], text).order)
        batch.step()
        assert batch.busy_slots == seed + 1
    late = [Asked([seed], text) for seed in (3, 4)]
    for asked in late:
        batch.step()
        batch.add(asked.order)
    assert batch.waiting == 2
    steps = 0
    while batch.waiting:
        batch.step()
        steps += 1
        assert batch.busy_slots in (3, 5)  # both at once
    assert steps <= TINY.grid


def test_a_dropped_orders_slots_are_free_at_once(packed: PackedPrior) -> None:
    text, batch = prompts(1, TINY)[0], Batch(packed, 6)
    kept, gone = Asked([1, 2], text, sampling=GUIDED), Asked([*range(30)], text)
    batch.add(gone.order)
    batch.add(kept.order)
    for _ in range(3):
        batch.step()
    batch.drop(gone.order)
    assert batch.busy_slots in (0, 2, 4)
    finish(batch)
    assert not gone.told
    assert kept.pictures() == alone(packed, kept)


def test_a_late_order_ends_with_too_late_and_the_others_go_on(packed: PackedPrior) -> None:
    text, batch = prompts(1, TINY)[0], Batch(packed, 4)
    late, kept = Asked([1], text, deadline=0.0), Asked([2], text)
    batch.add(late.order)
    batch.add(kept.order)
    finish(batch)
    assert [type(told) for told in late.told] == [TooLate]
    assert kept.done


def test_logits_that_are_not_finite_end_only_their_order(prior: Prior) -> None:
    broken = random_prior(TINY, spread=0.1)
    broken.text_embedding.weight.data[7].fill_(float("nan"))
    texts = prompts(2, TINY)
    texts[0, 1], texts[1, 1:3] = 7, 9
    batch = Batch(PackedPrior(broken), 4)
    bad, good = Asked([1, 2], texts[0]), Asked([1, 2], texts[1])
    batch.add(bad.order)
    batch.add(good.order)
    finish(batch)
    (error,) = bad.told
    assert isinstance(error, NonFiniteLogits)
    assert "text slot 1" in str(error)
    assert good.done
    again = Asked([1, 2], texts[1])  # in the rows that had NaN before
    batch.add(again.order)
    finish(batch)
    assert again.pictures() == good.pictures()


@pytest.mark.parametrize(
    ("what", "wanted"),
    [
        ("seeds", {"seeds": []}),
        ("top_k", {"sampling": SamplingConfig(top_k=TINY.image_vocab_size + 1)}),
        ("primed", {"primed": torch.full((8,), TINY.image_vocab_size)}),
        ("something to draw", {"primed": torch.zeros(TINY.image_len, dtype=torch.int64)}),
    ],
)
def test_an_order_that_cannot_be_drawn_is_refused(
    packed: PackedPrior, what: str, wanted: dict[str, Any]
) -> None:
    arguments: dict[str, Any] = {"seeds": [1], "text": prompts(1, TINY)[0]} | wanted
    asked = Asked(**arguments)
    batch = Batch(packed, 2)
    with pytest.raises(ValueError, match=what):
        batch.add(asked.order)
    assert batch.idle


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 5), st.sampled_from(KINDS[::3])),
        st.tuples(st.just("drop"), st.integers(0, 9)),
        st.tuples(st.just("step"), st.integers(1, 40)),
    ),
    max_size=12,
)


@settings(max_examples=15)
@given(slots=st.integers(2, 7), actions=ACTIONS)
def test_slots_never_leak(packed: PackedPrior, slots: int, actions: list[tuple]) -> None:
    batch, text = Batch(packed, slots), prompts(1, TINY)[0]
    asked: list[Asked] = []

    def add(count: int, sampling: SamplingConfig) -> None:
        asked.append(Asked([*range(count)], text, sampling=sampling))
        batch.add(asked[-1].order)

    def drop(which: int) -> None:
        if asked:
            batch.drop(asked.pop(which % len(asked)).order)

    def step(times: int) -> None:
        for _ in range(times):
            batch.step()

    do: dict[str, Callable[..., None]] = {"add": add, "drop": drop, "step": step}
    for name, *arguments in actions:
        do[name](*arguments)
        assert 0 <= batch.busy_slots <= slots
        assert sum(one.order.slots for one in asked) == batch.busy_slots
    finish(batch)
    assert all(one.done for one in asked)
    assert batch.waiting == 0
