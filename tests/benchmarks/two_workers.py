"""Two workers of a training of the prior against one, at the same batch a worker.

Real processes of one thread each, which read real shards: two of them should do twice the work.
Wall time; both ways in turn.
"""

import multiprocessing
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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


def rows(effort: Effort) -> list[Row]:
    """The quickstart's prior."""
    with TemporaryDirectory() as folder:
        tiny = tiny_tokens(Path(folder) / "data", rows=128)
        pairs = []
        for repeat in range(effort.repeats):
            rates = [_measure(tiny, Path(folder) / f"{repeat}-{size}", size) for size in (2, 1)]
            pairs.append(rates)
    ratios = [two["tokens"] / one["tokens"] for two, one in pairs]
    waits = [statistics.median(pair[index]["data_wait"] for pair in pairs) for index in (0, 1)]
    return [
        Row(
            row="two-workers",
            peer="one worker, the same batch a worker",
            precision="fp32",
            ours=significant(statistics.median(two["tokens"] for two, _ in pairs)),
            theirs=significant(statistics.median(one["tokens"] for _, one in pairs)),
            unit="tokens/s",
            ratio_median=significant(statistics.median(ratios)),
            ratio_min=significant(min(ratios)),
            ratio_max=significant(max(ratios)),
            versions=versions(("torch",)),
            note=f"{SAMPLES} pictures a worker, gloo, {len(os.sched_getaffinity(0))} processors; "
            f"waiting for input: {waits[0]:.2%} of the time with two, {waits[1]:.2%} with one",
        )
    ]


def _measure(tiny: TinyTokens, path: Path, world_size: int) -> dict[str, float]:
    """Tokens a second of all workers, and rank 0's share of waiting for batches."""
    path.mkdir()
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    processes = [
        context.Process(target=_work, args=(rank, world_size, path, tiny, sender))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    found: dict[str, float] = receiver.recv()
    return found


def _work(rank: int, world_size: int, path: Path, tiny: TinyTokens, result: Any) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{path / 'meeting'}", rank=rank, world_size=world_size
        )
    training = replace(
        TINY.training, steps=WARM_UP + MEASURED, batch_samples=SAMPLES * world_size, bpe_dropout=0.1
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
        result.send({"tokens": tokens / seconds, "data_wait": statistics.mean(waits)})
