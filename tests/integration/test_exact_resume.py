"""Trainings of the prior that are killed, in real processes: they go on as if nothing had been."""

import os
import random
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models.averaging import AveragingConfig
from models.prior import PriorConfig
from pipelines.data.stage import Manifest
from pipelines.data.tokenizer import CaptionTokenizer
from pipelines.training import stopping
from pipelines.training.prior_loop import train_prior
from pipelines.training.prior_training import (
    Cadence,
    PriorOptimizerConfig,
    PriorTraining,
    ShardingConfig,
)
from pipelines.training.stopping import StopRequest
from pipelines.training.token_loader import TokenBatch, TokenLoader
from tests.fixtures.datasets import TinyTokens, tiny_tokens
from tests.fixtures.groups import KILLED, die, join_group, note, notes, run_group

STEPS = 12
STOPPED = 75
BATCH = 4
MODEL = PriorConfig(
    n_layers=2,
    n_heads=2,
    d_model=16,
    text_len=24,  # of some captions a part, of others all: a batch's parts differ in tokens
    text_vocab_size=512,
    grid=4,
    image_vocab_size=32,
    conv_kernel=3,
)
TRAINING = PriorTraining(
    steps=STEPS,
    batch_samples=BATCH,
    precision="fp32",
    resblock_scaling="always",
    optimizer=PriorOptimizerConfig(peak_lr=1e-3, warmup_steps=2, decay="cosine", moments="fp32"),
    averaging=AveragingConfig(decay=0.5, every=2),
    bpe_dropout=0.2,
    recompute="none",
)


class Watched(TokenLoader):
    """Notes which samples it hands out."""

    file: Path

    def batch(self, step: int) -> TokenBatch:
        note(self.file, [step, self.keys_of(step)])
        return super().batch(step)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyTokens:
    return tiny_tokens(tmp_path_factory.mktemp("tokens"), rows=20, grid=4, image_vocab_size=32)


def train(
    rank: int,
    world_size: int,
    path: Path,
    attempt: int,
    tiny: TinyTokens,
    victim: int | None,
    kill_at: int,
    number: int,
    group_size: int,
) -> None:
    """One process: notes losses and samples, and kills itself if it is the victim."""
    join_group(rank, world_size, path / f"meeting-{attempt}")
    loader = Watched(
        Manifest.load(tiny.tokens, stage="encode_pairs"),
        CaptionTokenizer.from_file(tiny.tokenizer),
        text_len=MODEL.text_len,
        batch_samples=BATCH,
        bpe_dropout=TRAINING.bpe_dropout,
        seed=TRAINING.seed,
        rank=rank,
        world_size=world_size,
    )
    loader.file = path / f"samples-{attempt}-{rank}.jsonl"

    def on_log(step: int, metrics: dict[str, float]) -> None:
        if rank == 0:
            note(path / "losses.jsonl", [step, metrics["loss"].hex(), metrics["grad_norm"].hex()])
        if rank == victim and step == kill_at:
            die() if number != signal.SIGTERM else os.kill(os.getpid(), number)

    def on_resume(step: int, said: list[str]) -> None:
        if rank == 0:
            note(path / "resumed.jsonl", step)

    stopping.SECONDS_BETWEEN_LOOKS = 0.0  # these updates take milliseconds
    (own := path / f"rank-{rank}").mkdir(exist_ok=True)  # so that one rank alone is asked
    request = StopRequest(own)
    with request.on_sigterm():
        finished = train_prior(
            MODEL,
            replace(TRAINING, sharding=ShardingConfig(group_size=group_size)),
            cadence=Cadence(log_every=1, checkpoint_every=3, sample_every=1000),
            loader=loader,
            device=torch.device("cpu"),
            checkpoints=path / "checkpoints",
            on_log=on_log,
            on_resume=on_resume,
            on_weights=lambda step, weights: None,
            is_asked_to_stop=request.is_asked,
        )
    sys.exit(0 if finished else STOPPED)


def attempt(
    path: Path,
    number: int,
    tiny: TinyTokens,
    world_size: int,
    kill: tuple[int, int] | None = None,
    by: int = signal.SIGKILL,
    group_size: int = 2,
) -> None:
    """A group that trains to the end, or until (rank, step) is killed."""
    path.mkdir(exist_ok=True)
    victim, step = kill if kill else (None, 0)
    codes = run_group(train, world_size, path, number, tiny, victim, step, by, group_size)
    if by == signal.SIGTERM:
        assert codes == [STOPPED] * world_size
    elif kill is None:
        assert codes == [0] * world_size
    else:
        assert codes[kill[0]] == KILLED
        assert 0 not in codes  # whoever is left does not believe that it has finished


def losses(path: Path) -> dict[int, set[tuple[str, ...]]]:
    """What was logged for each update, in all attempts."""
    found: dict[int, set[tuple[str, ...]]] = {}
    for step, *values in notes(path / "losses.jsonl"):
        found.setdefault(step, set()).add(tuple(values))
    return found


def samples(path: Path, number: int, world_size: int) -> dict[int, list[str]]:
    """Names of the samples of each update of an attempt, all ranks', in order."""
    ranks = [dict(notes(path / f"samples-{number}-{rank}.jsonl")) for rank in range(world_size)]
    both = ranks[0].keys() & ranks[-1].keys()
    return {step: [key for rank in ranks for key in rank[step]] for step in both}


def check_killed(path: Path, tiny: TinyTokens, seed: int, kills: int, group_size: int) -> None:
    """Two processes, one of which is killed again and again at random: every bit is the same."""
    rng = random.Random(seed)
    attempt(path / "whole", 0, tiny, 2, group_size=group_size)
    whole = losses(path / "whole")
    assert sorted(whole) == list(range(1, STEPS + 1))
    at = sorted(rng.sample(range(2, STEPS + 1), kills))
    for number, step in enumerate(at):
        kill = rng.randrange(2), step
        attempt(path / "killed", number, tiny, 2, kill, group_size=group_size)
    attempt(path / "killed", kills, tiny, 2, group_size=group_size)
    assert losses(path / "killed") == whole, f"seed {seed}, killed at {at}"
    assert all(len(values) == 1 for values in whole.values())
    resumed: list[Any] = notes(path / "killed" / "resumed.jsonl")
    # The checkpoint of the last interval may not have been whole yet.
    for before, step in zip(at, resumed[1:], strict=True):
        assert before - 6 <= step <= before


@pytest.mark.parametrize("group_size", [1, 2], ids=["replicas", "shards"])
def test_a_killed_training_ends_in_the_same_bits(
    tmp_path: Path, tiny: TinyTokens, group_size: int
) -> None:
    check_killed(tmp_path, tiny, seed=0, kills=2, group_size=group_size)


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(1, 16))
def test_wherever_it_is_killed(tmp_path: Path, tiny: TinyTokens, seed: int) -> None:
    check_killed(tmp_path, tiny, seed=seed, kills=3, group_size=1 + seed % 2)


def test_two_workers_then_one_then_two_see_the_same_samples_in_the_same_order(
    tmp_path: Path, tiny: TinyTokens
) -> None:
    attempt(tmp_path / "one", 0, tiny, 1)
    path = tmp_path / "changing"
    attempt(path, 0, tiny, 2, (1, 5))
    attempt(path, 1, tiny, 1, (0, 10))
    attempt(path, 2, tiny, 2)
    resumed: list[Any] = notes(path / "resumed.jsonl")
    assert 0 <= resumed[1] <= 3 <= resumed[2] <= 9
    wanted = samples(tmp_path / "one", 0, 1)
    assert len(wanted) == STEPS
    seen: dict[int, list[str]] = {}
    for number, world_size in enumerate((2, 1, 2)):
        found = samples(path, number, world_size)
        assert found.items() <= wanted.items()
        seen |= found
    assert seen == wanted
    expected = losses(tmp_path / "one")
    for step, values in losses(path).items():
        ((loss, norm),) = expected[step]
        for other, other_norm in values:
            assert float.fromhex(other) == pytest.approx(float.fromhex(loss), rel=1e-5)
            assert float.fromhex(other_norm) == pytest.approx(float.fromhex(norm), rel=1e-3)


def test_one_rank_that_is_told_to_end_stops_all_after_a_checkpoint_at_once(
    tmp_path: Path, tiny: TinyTokens
) -> None:
    attempt(tmp_path / "whole", 0, tiny, 2)
    path = tmp_path / "stopped"
    attempt(path, 0, tiny, 2, (1, 4), by=signal.SIGTERM)
    attempt(path, 1, tiny, 2)
    # Asked after update 4, known to all in 5: no update is made twice, none is missing.
    assert notes(path / "resumed.jsonl") == [0, 5]
    assert len(notes(path / "losses.jsonl")) == STEPS
    assert losses(path) == losses(tmp_path / "whole")


def test_a_batch_that_does_not_divide_is_refused_before_the_first_update() -> None:
    with pytest.raises(
        ValueError, match="4, 3 workers and 1 micro_batches: the next that does is 6"
    ):
        TRAINING.check_workers(3)
