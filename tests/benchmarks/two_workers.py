"""Two workers of a training of the prior against one, at the same batch a worker.

Real processes of one thread each, which read real shards: two of them should do twice the work.
Two trainings that know nothing of each other say what the machine has for a second process. The
workers are replicas, as the quickstart's are, or share the weights out; they send each other as
much for 64 pictures as for 16. Wall time; all ways in turn.
"""

import multiprocessing
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from jobs.configs.train_prior import TINY
from pipelines.data.stage import Manifest
from pipelines.data.tokenizer import CaptionTokenizer
from pipelines.training.prior_loop import Cadence, train_prior
from pipelines.training.sharding import ShardingConfig
from pipelines.training.token_loader import TokenLoader
from tests.benchmarks.measure import Effort, Row, significant, versions
from tests.fixtures.datasets import TinyTokens, tiny_tokens

WARM_UP = 4
MEASURED_SAMPLES = 320  # of a worker


class Way(NamedTuple):
    """How a training goes."""

    samples: int
    """A worker's, of an update."""
    workers: int = 1
    group_size: int = 1
    """Workers that share the weights out."""
    copies: int = 1
    """Such trainings at a time."""

    @property
    def measured(self) -> int:
        """Updates."""
        return MEASURED_SAMPLES // self.samples


WAYS = {
    # Half of the quickstart's batch of two workers.
    "two-workers": Way(16, workers=2),
    "two-workers-64": Way(64, workers=2),
    "two-workers-sharded": Way(16, workers=2, group_size=2),
}


class Rates(NamedTuple):
    """What a training, or several, did."""

    tokens: float
    """A second, of all workers."""
    data_wait: float
    """Share of the time in which rank 0 waited for batches."""


def rows(effort: Effort) -> list[Row]:
    """The quickstart's prior."""
    others = {Way(samples, copies=copies) for samples in (16, 64) for copies in (1, 2)}
    found: dict[Way, list[Rates]] = {way: [] for way in (*WAYS.values(), *sorted(others))}
    with TemporaryDirectory() as folder:
        tiny = tiny_tokens(Path(folder) / "data", rows=128)
        for repeat in range(effort.repeats):
            for number, (way, rates) in enumerate(found.items()):
                rates.append(_measure(tiny, Path(folder) / f"{repeat}-{number}", way))
    return [_row(name, way, found) for name, way in WAYS.items()]


def _row(name: str, way: Way, found: dict[Way, list[Rates]]) -> Row:
    ours, alone, strangers = (
        found[which] for which in (way, Way(way.samples), Way(way.samples, copies=2))
    )
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
        note=f"{way.samples} pictures a worker, gloo, {len(os.sched_getaffinity(0))} processors; "
        "two trainings that know nothing of each other reach "
        f"{statistics.median(_ratios(strangers, alone)):.2f} times one; "
        f"waiting for input: {waits[0]:.2%} of the time with two, {waits[1]:.2%} with one",
    )


def _ratios(ours: list[Rates], theirs: list[Rates]) -> list[float]:
    return [own.tokens / other.tokens for own, other in zip(ours, theirs, strict=True)]


def _measure(tiny: TinyTokens, path: Path, way: Way) -> Rates:
    context = multiprocessing.get_context("spawn")
    processes, receivers = [], []
    for copy in range(way.copies):
        (path / str(copy)).mkdir(parents=True)
        receiver, sender = context.Pipe(duplex=False)
        receivers.append(receiver)
        for rank in range(way.workers):
            arguments = (rank, way, path / str(copy), tiny, sender)
            processes.append(context.Process(target=_work, args=arguments))
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    rates: list[Rates] = [receiver.recv() for receiver in receivers]
    return Rates(sum(r.tokens for r in rates), statistics.mean(r.data_wait for r in rates))


def _work(rank: int, way: Way, path: Path, tiny: TinyTokens, result: Any) -> None:
    torch.set_num_threads(1)
    if way.workers > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{path / 'meeting'}", rank=rank, world_size=way.workers
        )
    training = replace(
        TINY.training,
        steps=WARM_UP + way.measured,
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
    logged: list[tuple[float, dict[str, float]]] = []
    train_prior(
        TINY.prior,
        training,
        cadence=Cadence(log_every=1, checkpoint_every=10_000, sample_every=10_000),
        loader=loader,
        device=torch.device("cpu"),
        checkpoints=path / "checkpoints",
        on_log=lambda step, metrics: logged.append((time.perf_counter(), metrics)),
        on_resume=lambda step, said: None,
        on_weights=lambda step, weights: None,
    )
    if rank == 0:
        seconds = logged[-1][0] - logged[WARM_UP - 1][0]
        tokens = way.measured * training.batch_samples * TINY.prior.stream_len
        waits = [metrics["data_wait"] for _, metrics in logged[WARM_UP:]]
        result.send(Rates(tokens / seconds, statistics.mean(waits)))
