"""A request's candidates over samplers: the same pictures, the best first, nothing left behind."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Iterator
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from pipelines.sampling.api import ImagesRequest
from pipelines.sampling.batch_thread import BatchThread
from pipelines.sampling.batching import Batch
from pipelines.sampling.drawing import SamplingConfig
from pipelines.sampling.engine import Sampler
from pipelines.sampling.fan_out import FanOut, SamplerGone, Samplers, SlotPictures
from pipelines.sampling.openai_errors import ApiError
from pipelines.sampling.picture_source import (
    Busy,
    PartialPicture,
    RankedPicture,
    ServingLimits,
    TooLate,
)
from pipelines.sampling.pieces import Piece, PieceItem, PieceSampler
from tests.fixtures.models import tiny_models


class Brightness:
    """A reranker that prefers bright pictures, so that its order can be checked."""

    def scores(self, prompt: str, pictures: np.ndarray) -> np.ndarray:
        return pictures.mean((1, 2, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Sampler:
    return tiny_models(tmp_path_factory.mktemp("models"), rows=8).sampler()


@pytest.fixture(scope="module")
def pieces(sampler: Sampler) -> Iterator[PieceSampler]:
    pieces = PieceSampler(sampler, BatchThread(Batch(sampler.packed, 4)))
    yield pieces
    pieces.close()


def asked(**fields: Any) -> ImagesRequest:
    known: dict[str, Any] = {"prompt": "dog", "prompt_tokens": 1, "n": 1, "seed": 3}
    return ImagesRequest(**(known | {"sampling": SamplingConfig()} | fields))


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


async def all_of(source: FanOut, request: ImagesRequest) -> list[Any]:
    async with aclosing(source.draw(request)) as items:
        return [item async for item in items]


async def score(prompt: str, pictures: np.ndarray) -> np.ndarray:
    return Brightness().scores(prompt, pictures)


def source_of(draw: Any, count: int = 1, **limits: Any) -> FanOut:
    samplers = Samplers(draw=draw, count=count, slots=4, score=score)
    return FanOut(samplers, ServingLimits(**limits))


def test_pictures_are_the_samplers_in_the_order_of_their_seeds(sampler: Sampler) -> None:
    source = SlotPictures(sampler, ServingLimits())
    start = sampler.first_rows(sampler.generate("dog")[0], 3)
    for request in (asked(n=5), asked(n=2, start=start)):
        (ranked,) = run(all_of(source, request))
        for index, picture in enumerate(ranked):
            assert picture.score is None
            assert picture.sample.seed == 3 + index
            if request.start is not None:
                assert picture.sample.tokens[: len(start)].tolist() == start.tolist()
            else:
                (wanted,) = sampler.generate("dog", seed=3 + index)
                assert np.array_equal(picture.sample.pixels, wanted)
    source.pieces.close()


def test_partial_pictures_come_before_the_whole_ones_of_the_first_n(pieces: PieceSampler) -> None:
    items = run(all_of(source_of(pieces.draw), asked(n=2, rerank_pool=6, partial_images=3)))
    partial = [item for item in items if isinstance(item, PartialPicture)]
    assert {(item.index, item.rows) for item in partial} == {
        (i, r) for i in (0, 1) for r in (1, 3, 5)
    }
    assert isinstance(items[-1], list)


@pytest.fixture(scope="module")
def pool(pieces: PieceSampler) -> list[RankedPicture]:
    found: list[RankedPicture] = run(all_of(source_of(pieces.draw), asked(n=21)))[0]
    return found


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_pool_is_ranked_the_same_over_any_number_of_samplers(
    pieces: PieceSampler, pool: list[RankedPicture], count: int
) -> None:
    (ranked,) = run(all_of(source_of(pieces.draw, count), asked(n=4, rerank_pool=21)))
    best = sorted(pool, key=lambda each: -each.sample.pixels.mean())[:4]
    assert [each.sample.seed for each in ranked] == [each.sample.seed for each in best]
    scores = [each.score for each in ranked]
    assert scores == sorted(scores, reverse=True)


def test_a_full_queue_refuses_before_the_first_item_and_takes_again(pieces: PieceSampler) -> None:
    async def work() -> None:
        source = source_of(pieces.draw, max_waiting=0, retry_after_seconds=7)
        many = [asyncio.ensure_future(all_of(source, asked(n=4, seed=s))) for s in range(8)]
        results = await asyncio.gather(*many, return_exceptions=True)
        refused = [each for each in results if isinstance(each, Busy)]
        assert len(refused) == 4  # a request counts as a quarter of the four slots at most
        assert {each.retry_after_seconds for each in refused} == {7}
        assert source.load == 0
        assert source.tally.refused == 4
        assert await all_of(source, asked())

    run(work())


def test_whoever_leaves_frees_the_slots(pieces: PieceSampler) -> None:
    async def work() -> None:
        source = source_of(pieces.draw)
        async with aclosing(source.draw(asked(rerank_pool=400, partial_images=3))) as items:
            await anext(items)
        while pieces.load().busy or pieces.load().waiting:
            await asyncio.sleep(0.001)
        assert source.load == 0
        assert source.tally.cancelled == 1
        assert not source.tally.failed

    run(work())


def test_a_deadline_ends_what_is_drawn_and_what_waits(pieces: PieceSampler) -> None:
    source = source_of(pieces.draw, deadline_seconds=0.05)
    with pytest.raises(TooLate):
        run(all_of(source, asked(rerank_pool=400)))
    assert source.tally.late == 1


class Mortal:
    """A sampler whose process ends after so many items, so many times."""

    def __init__(self, pieces: PieceSampler, deaths: int) -> None:
        self.pieces, self.deaths = pieces, deaths

    async def draw(self, piece: Piece) -> AsyncGenerator[PieceItem, None]:
        count = 0
        async for item in self.pieces.draw(piece):
            if self.deaths and count == 3:
                self.deaths -= 1
                raise SamplerGone
            count += 1
            yield item


def test_a_sampler_that_ends_is_replaced_once_without_a_trace(pieces: PieceSampler) -> None:
    request = asked(n=4, partial_images=3)
    wanted = run(all_of(source_of(pieces.draw), request))
    source = source_of(Mortal(pieces, 1).draw)
    items = run(all_of(source, request))
    assert source.tally.retried == 1

    def shown(items: list[Any]) -> list[tuple[int, int]]:
        return sorted((i.index, i.rows) for i in items if isinstance(i, PartialPicture))

    assert shown(items) == shown(wanted)
    for mine, other in zip(items[-1], wanted[-1], strict=True):
        assert np.array_equal(mine.sample.pixels, other.sample.pixels)


def test_pictures_that_end_two_samplers_are_given_up(pieces: PieceSampler) -> None:
    with pytest.raises(ApiError, match="so did a second one") as caught:
        run(all_of(source_of(Mortal(pieces, 2).draw), asked(n=4, partial_images=3)))
    assert caught.value.status == 503
    assert caught.value.headers == {"x-should-retry": "false"}


def test_a_pool_without_a_reranker_is_refused(pieces: PieceSampler) -> None:
    source = FanOut(Samplers(draw=pieces.draw, count=1, slots=4), ServingLimits())
    with pytest.raises(ValueError, match="rerank_pool"):
        run(all_of(source, asked(rerank_pool=4)))
