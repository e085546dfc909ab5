"""Two workers of a training of the prior against one, at the same batch a worker.

Real processes of one thread each, in the environment of a job's workers, which read real shards:
two of them should do twice the work. Two trainings that know nothing of each other say what the
machine has for a second process; the same two, if each waits for the other after every update and
sends it nothing, say what it has for any two that work together. The workers are replicas, as the
quickstart's are, or share the weights out; they send each other as much for 64 pictures as for 16.

All trainings are there the whole time and take turns of a few seconds, because the machine's speed
is another from one minute to the next. Wall time.
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist

from jobs.configs.train_prior import TINY
from jobs.workers import WORKER_ENVIRONMENT
from pipelines.data.stage import Manifest
from pipelines.data.tokenizer import CaptionTokenizer
from pipelines.training.prior_loop import train_prior
from pipelines.training.prior_training import Cadence, ShardingConfig
from pipelines.training.token_loader import TokenLoader
from tests.benchmarks.measure import Effort, Row, significant, versions
from tests.fixtures.datasets import TinyTokens, tiny_tokens

TURNS = 3  # of each way, a repeat
TURN_SAMPLES = 256  # of a worker
NEVER = 1_000_000


class Way(NamedTuple):
    """How a training goes."""

    samples: int
    """A worker's, of an update."""
    workers: int = 1
    group_size: int = 1
    """Workers that share the weights out."""
    copies: int = 1
    """Such trainings at a time."""
    in_step: bool = False
    """Whether these wait for each other after every update."""


WAYS = {
    # Half of the quickstart's batch of two workers.
    "two-workers": Way(16, workers=2),
    "two-workers-sharded": Way(16, workers=2, group_size=2),
    "two-workers-64": Way(64, workers=2),
}


class Rates(NamedTuple):
    """What a training, or several, did in a turn."""

    tokens: float
    """A second, of all workers."""
    data_wait: float
    """Share of the time in which rank 0 waited for batches."""


def rows(effort: Effort) -> list[Row]:
    """The quickstart's prior."""
    ways = [Way(16), *WAYS.values(), Way(64)]
    ways += [Way(n, copies=2, in_step=in_step) for n in (16, 64) for in_step in (False, True)]
    ways.sort(key=lambda way: way.samples)  # what is compared follows each other
    found: dict[Way, list[Rates]] = {way: [] for way in ways}
    with TemporaryDirectory() as folder:
        tiny = tiny_tokens(Path(folder) / "data", rows=128)
        with _trainings(ways, tiny, Path(folder)) as trainings:
            for turn in range(1 + TURNS * effort.repeats):
                for way, workers in trainings.items():
                    rates = _turn(way, workers)
                    if turn:  # the first warms up
                        found[way].append(rates)
    return [_row(name, way, found) for name, way in WAYS.items()]


def _row(name: str, way: Way, found: dict[Way, list[Rates]]) -> Row:
    ours, alone = found[way], found[Way(way.samples)]
    strangers = found[Way(way.samples, copies=2)]
    in_step = found[Way(way.samples, copies=2, in_step=True)]
    ratios = _ratios(ours, alone)
    waits = [statistics.median(rates.data_wait for rates in which) for which in (ours, alone)]
    return Row(
        row=name,
        peer="one worker, the same batch a worker",
        precision="fp32",
        ours=significant(statistics.median(rates.tokens for rates in ours)),
        theirs=significant(statistics.median(rates.tokens for rates in alone)),
        unit="tokens/s",
        ratio_median=significant(statistics.median(ratios)),
        ratio_min=significant(min(ratios)),
        ratio_max=significant(max(ratios)),
        versions=versions(("torch",)),
        note=f"{way.samples} pictures a worker, gloo, {len(os.sched_getaffinity(0))} processors, "
        f"{len(ratios)} turns; two trainings that know nothing of each other reach "
        f"{statistics.median(_ratios(strangers, alone)):.2f} times one, and "
        f"{statistics.median(_ratios(in_step, alone)):.2f} times if each waits for the other after "
        "every update; "
        f"waiting for input: {waits[0]:.2%} of the time with two, {waits[1]:.2%} with one",
    )


def _ratios(ours: list[Rates], theirs: list[Rates]) -> list[float]:
    return [own.tokens / other.tokens for own, other in zip(ours, theirs, strict=True)]


@contextmanager
def _trainings(
    ways: list[Way], tiny: TinyTokens, folder: Path
) -> Iterator[dict[Way, list[list[Connection]]]]:
    """Trainings that wait for their turns: of each way its copies, of each copy its workers."""
    context = multiprocessing.get_context("spawn")
    processes = []
    barriers = []  # held here until they are opened there
    trainings: dict[Way, list[list[Connection]]] = {}
    for number, way in enumerate(ways):
        barriers.append(context.Barrier(way.copies) if way.in_step else None)
        for copy in range(way.copies):
            (path := folder / f"{number}-{copy}").mkdir()
            workers = []
            for rank in range(way.workers):
                own, others = context.Pipe()
                workers.append(own)
                arguments = (rank, way, path, tiny, others, barriers[-1])
                processes.append(context.Process(target=_work, args=arguments, daemon=True))
            trainings.setdefault(way, []).append(workers)
    with patch.dict(os.environ, WORKER_ENVIRONMENT):
        for process in processes:
            process.start()
    try:
        yield trainings
    finally:
        for process in processes:
            process.kill()
            process.join()


def _turn(way: Way, copies: list[list[Connection]]) -> Rates:
    for workers in copies:
        for worker in workers:
            worker.send("go on")
    told = [[Rates(*worker.recv()) for worker in workers] for workers in copies]
    rates = [of_rank_0 for of_rank_0, *_ in told]
    return Rates(sum(r.tokens for r in rates), statistics.mean(r.data_wait for r in rates))


def _work(
    rank: int, way: Way, path: Path, tiny: TinyTokens, parent: Connection, barrier: Barrier | None
) -> None:
    """Train for ever, a turn each time that the parent says so."""
    torch.set_num_threads(1)
    if way.workers > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{path / 'meeting'}", rank=rank, world_size=way.workers
        )
    training = replace(
        TINY.training,
        steps=NEVER,
        batch_samples=way.samples * way.workers,
        bpe_dropout=0.1,
        # What the workers gather they have room for.
        sharding=ShardingConfig(group_size=way.group_size, keep_gathered=True),
    )
    loader = TokenLoader(
        Manifest.load(tiny.tokens, stage="encode_pairs"),
        CaptionTokenizer.from_file(tiny.tokenizer),
        text_len=TINY.prior.text_len,
        batch_samples=training.batch_samples,
        bpe_dropout=training.bpe_dropout,
        seed=0,
        rank=rank,
        world_size=way.workers,
    )
    logged: list[tuple[float, float]] = []

    def on_log(step: int, metrics: dict[str, float]) -> None:
        if barrier:
            barrier.wait()
        logged.append((time.perf_counter(), metrics["data_wait"]))
        if len(logged) == TURN_SAMPLES // way.samples:
            # The first update is not counted: it had waited for its turn.
            seconds = logged[-1][0] - logged[0][0]
            tokens = (len(logged) - 1) * training.batch_samples * TINY.prior.stream_len
            parent.send((tokens / seconds, statistics.mean(wait for _, wait in logged[1:])))
            logged.clear()
            parent.recv()

    parent.recv()
    train_prior(
        TINY.prior,
        training,
        cadence=Cadence(log_every=1, checkpoint_every=NEVER, sample_every=NEVER),
        loader=loader,
        device=torch.device("cpu"),
        checkpoints=path / "checkpoints",
        on_log=on_log,
        on_resume=lambda step, said: None,
        on_weights=lambda step, weights: None,
    )
