"""Two workers of a training of the prior against one, at the same batch a worker.

Real processes of one thread each, which read real shards: two of them should do twice the work.
Two trainings that know nothing of each other say what the machine has for a second process. The
workers share the weights out, as the quickstart's do, or are replicas. Wall time; all ways in turn.
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
from pipelines.training.token_loader import TokenLoader
from tests.benchmarks.measure import Effort, Row, significant, versions
from tests.fixtures.datasets import TinyTokens, tiny_tokens

WARM_UP, MEASURED = 5, 20
SAMPLES = 16  # a worker's, of an update: half of the quickstart's batch of two workers
GROUP_SIZES = {"two-workers": 2, "two-workers-replicas": 1}


class Rates(NamedTuple):
    """What a training, or several, did."""

    tokens: float
    """A second, of all workers."""
    data_wait: float
    """Share of the time in which rank 0 waited for batches."""


def rows(effort: Effort) -> list[Row]:
    """The quickstart's prior."""
    found: dict[str, list[Rates]] = {name: [] for name in (*GROUP_SIZES, "alone", "strangers")}
    with TemporaryDirectory() as folder:
        tiny = tiny_tokens(Path(folder) / "data", rows=128)
        for repeat in range(effort.repeats):
            path = Path(folder) / str(repeat)
            for name, group_size in GROUP_SIZES.items():
                found[name].append(_measure(tiny, path / name, 2, group_size))
            found["alone"].append(_measure(tiny, path / "alone", 1))
            found["strangers"].append(_measure(tiny, path / "strangers", 1, copies=2))
    return [_row(name, found) for name in GROUP_SIZES]


def _row(name: str, found: dict[str, list[Rates]]) -> Row:
    ratios = _ratios(found, name)
    waits = [statistics.median(rates.data_wait for rates in found[way]) for way in (name, "alone")]
    return Row(
        row=name,
        peer="one worker, the same batch a worker",
        precision="fp32",
        ours=significant(statistics.median(rates.tokens for rates in found[name])),
        theirs=significant(statistics.median(rates.tokens for rates in found["alone"])),
        unit="tokens/s",
        ratio_median=significant(statistics.median(ratios)),
        ratio_min=significant(min(ratios)),
        ratio_max=significant(max(ratios)),
        versions=versions(("torch",)),
        note=f"{SAMPLES} pictures a worker, gloo, {len(os.sched_getaffinity(0))} processors; two "
        "trainings that know nothing of each other reach "
        f"{statistics.median(_ratios(found, 'strangers')):.2f} times one; "
        f"waiting for input: {waits[0]:.2%} of the time with two, {waits[1]:.2%} with one",
    )


def _ratios(found: dict[str, list[Rates]], way: str) -> list[float]:
    pairs = zip(found[way], found["alone"], strict=True)
    return [ours.tokens / alone.tokens for ours, alone in pairs]


def _measure(
    tiny: TinyTokens, path: Path, world_size: int, group_size: int = 1, copies: int = 1
) -> Rates:
    """Of all workers of as many trainings at a time."""
    context = multiprocessing.get_context("spawn")
    processes, receivers = [], []
    for copy in range(copies):
        (path / str(copy)).mkdir(parents=True)
        receiver, sender = context.Pipe(duplex=False)
        receivers.append(receiver)
        for rank in range(world_size):
            arguments = (rank, world_size, group_size, path / str(copy), tiny, sender)
            processes.append(context.Process(target=_work, args=arguments))
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    rates: list[Rates] = [receiver.recv() for receiver in receivers]
    return Rates(sum(r.tokens for r in rates), statistics.mean(r.data_wait for r in rates))


def _work(
    rank: int, world_size: int, group_size: int, path: Path, tiny: TinyTokens, result: Any
) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{path / 'meeting'}", rank=rank, world_size=world_size
        )
    training = replace(
        TINY.training,
        steps=WARM_UP + MEASURED,
        batch_samples=SAMPLES * world_size,
        bpe_dropout=0.1,
        sharding=replace(TINY.training.sharding, group_size=group_size),
    )
    loader = TokenLoader(
        Manifest.load(tiny.tokens, stage="encode_pairs"),
        CaptionTokenizer.from_file(tiny.tokenizer),
        text_len=TINY.prior.text_len,
        batch_samples=training.batch_samples,
        bpe_dropout=training.bpe_dropout,
        seed=0,
        rank=rank,
        world_size=world_size,
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
        tokens = MEASURED * training.batch_samples * TINY.prior.stream_len
        waits = [metrics["data_wait"] for _, metrics in logged[WARM_UP:]]
        result.send(Rates(tokens / seconds, statistics.mean(waits)))
