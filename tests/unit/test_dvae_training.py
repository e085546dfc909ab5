"""The dVAE's training loop, on one process and on two gloo processes."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from models.averaging import AveragingConfig
from models.dvae import DVAEConfig
from models.dvae_objective import DVAESchedule, LossScale
from pipelines.training.dvae_loop import (
    SKIPS_IN_A_ROW,
    DVAECadence,
    DVAETrainer,
    DVAETraining,
    train_dvae,
)

MODEL = DVAEConfig(
    image_size=16, vocab_size=12, n_hid=8, n_init=6, group_count=3, n_blk_per_group=1
)
STEPS = 6
KILLED = 9


def training(**overrides: Any) -> DVAETraining:
    values: dict[str, Any] = {
        "steps": STEPS,
        "batch_samples": 4,
        "precision": "fp32",
        "schedule": DVAESchedule(
            beta_steps=3, tau_steps=5, lr_start=1e-2, lr_steps=STEPS, warmup_steps=2
        ),
        "clip_norm": 1.0,
        "averaging": AveragingConfig(decay=0.5, every=1),
    }
    return DVAETraining(**(values | overrides))


class Killed(Exception):
    pass


class Noise:
    """A loader of random pictures: batches are a function of the step, like PictureLoader's."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size

    def batch(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        pictures = torch.randint(256, (4, 16, 16, 3), dtype=torch.uint8, generator=generator)
        share = 4 // self.world_size
        return pictures[self.rank * share : (self.rank + 1) * share].permute(0, 3, 1, 2)

    def keys(self, step: int) -> list[str]:
        return [f"picture-{step}"]


def run(
    path: Path,
    *,
    how: DVAETraining | None = None,
    kill_at: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Any]:
    """Train, or break off at a step; what the effects were told."""
    told: dict[str, Any] = {"log": {}, "resumed": [], "images": {}}

    def on_log(step: int, metrics: dict[str, float]) -> None:
        told["log"][step] = metrics
        if step == kill_at and world_size > 1:
            os._exit(KILLED)
        if step == kill_at:
            raise Killed

    def on_images(step: int, images: dict[str, np.ndarray]) -> None:
        told["images"][step] = images

    told["weights"] = train_dvae(
        MODEL,
        how or training(),
        cadence=DVAECadence(log_every=1, checkpoint_every=2, images_every=3),
        loader=Noise(rank, world_size),  # type: ignore[arg-type]
        device=torch.device("cpu"),
        rank=rank,
        world_size=world_size,
        checkpoints=path / "checkpoints",
        on_log=on_log,
        on_resume=lambda step, said: told["resumed"].append((step, said)),
        on_images=on_images,
    )
    return told


def run_rank(rank: int, path: Path, kill_at: int, meeting: Path) -> None:
    """One of two spawned processes; leaves what it was told in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    told = run(path, kill_at=kill_at, rank=rank, world_size=2)
    torch.save({key: told[key] for key in ("log", "resumed", "weights")}, path / f"told-{rank}.pt")


def spawn(path: Path, kill_at: int = 0) -> list[dict[str, Any]]:
    """What each of two processes was told; empty if they were to end without a word."""
    path.mkdir(exist_ok=True)
    arguments = (path, kill_at, path / f"meeting-{kill_at}")
    context = mp.start_processes(run_rank, arguments, nprocs=2, join=False, start_method="spawn")
    for process in context.processes:
        process.join(120)
    codes = [process.exitcode for process in context.processes]
    assert codes == ([KILLED, KILLED] if kill_at else [0, 0])
    if kill_at:
        return []
    return [torch.load(path / f"told-{rank}.pt", weights_only=True) for rank in (0, 1)]


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


TIMES = ("images_per_second", "data_wait")


def losses(log: dict[int, dict[str, float]], step: int) -> dict[str, float]:
    return {name: value for name, value in log[step].items() if name not in TIMES}


def test_a_killed_and_resumed_training_ends_in_the_same_bits(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", kill_at=5)
    check_resumed(whole, run(tmp_path / "killed"))


def test_two_killed_and_resumed_processes_end_in_the_same_bits(tmp_path: Path) -> None:
    whole = spawn(tmp_path / "whole")
    spawn(tmp_path / "killed", kill_at=5)
    resumed = spawn(tmp_path / "killed")
    for one, other in zip(whole, resumed, strict=True):
        check_resumed(one, other)
    assert same(whole[0]["weights"], whole[1]["weights"])


def check_resumed(whole: dict[str, Any], resumed: dict[str, Any]) -> None:
    assert resumed["resumed"][0][0] == 4
    assert same(whole["weights"], resumed["weights"])
    for step in (5, 6):
        assert losses(whole["log"], step) == losses(resumed["log"], step)


def test_ranks_see_parts_of_one_batch_under_noise_of_their_own() -> None:
    trainers = [
        DVAETrainer(MODEL, training(), device=torch.device("cpu"), rank=rank, world_size=2)
        for rank in (0, 1)
    ]
    whole = DVAETrainer(MODEL, training(), device=torch.device("cpu")).hard(Noise().batch(0))
    halves = [trainer.hard(Noise(rank, 2).batch(0)) for rank, trainer in enumerate(trainers)]
    assert torch.equal(torch.cat([half.tokens for half in halves]), whole.tokens)
    same_pictures = [trainer.hard(Noise().batch(0)).value for trainer in trainers]
    assert same_pictures[0] != same_pictures[1]


def test_training_raises_the_bound_and_shows_its_progress() -> None:
    schedule = DVAESchedule(tau_steps=5, lr_start=1e-2)
    trainer = DVAETrainer(MODEL, training(schedule=schedule), device=torch.device("cpu"))
    # Squares of one colour: noise could not be told from other noise by four codes a side.
    batch = Noise().batch(0)[:, :, ::8, ::8].repeat_interleave(8, 2).repeat_interleave(8, 3)
    before = float(trainer.hard(batch).value)
    for _ in range(40):
        trainer.update(batch)
    assert float(trainer.hard(batch).value) > before + 0.1
    row = trainer.metrics(trainer.update(batch), trainer.hard(batch))
    assert row["gap"] == pytest.approx(row["relaxed_elb"] - row["hard_elb"])
    assert 1 <= row["perplexity"] <= row["codes_used"] <= 12


def test_the_log_and_the_pictures_are_told(tmp_path: Path) -> None:
    told = run(tmp_path)
    assert set(told["log"]) == set(range(1, STEPS + 1))
    assert {"tau", "beta", "lr", "reconstruction", "kl", "data_wait"} <= set(told["log"][1])
    assert set(told["images"]) == {3, 6}
    shapes = {name: rows.shape for name, rows in told["images"][6].items()}
    assert shapes == dict.fromkeys(("original", "hard", "relaxed"), (4, 16, 16, 3))


def test_a_batch_that_is_not_finite_changes_no_weight(tmp_path: Path) -> None:
    trainer = DVAETrainer(MODEL, training(), device=torch.device("cpu"))
    trainer.update(Noise().batch(0))
    before = {name: value.detach().clone() for name, value in trainer.parameters.items()}
    good = trainer._pixels
    trainer._pixels = lambda batch: good(batch) * float("nan")  # type: ignore[method-assign]
    trainer.update(Noise().batch(1))
    assert same(before, {name: value.detach() for name, value in trainer.parameters.items()})
    assert (trainer.skipped, trainer.skipped_in_a_row, trainer.step) == (1, 1, 2)
    trainer._pixels = good  # type: ignore[method-assign]
    trainer.update(Noise().batch(2))
    assert trainer.skipped_in_a_row == 0
    assert not same(before, dict(trainer.parameters))


def test_ten_such_batches_in_a_row_stop_the_run_by_name(tmp_path: Path) -> None:
    how = training(steps=30, schedule=DVAESchedule(beta_start=float("inf")))
    with pytest.raises(RuntimeError, match=f"{SKIPS_IN_A_ROW} updates in a row.*picture-9"):
        run(tmp_path, how=how)


def test_the_loss_scale_halves_on_overflow_and_doubles_in_peace() -> None:
    scale = LossScale("fp16")
    scale.update(finite=False)
    assert scale.value == LossScale.START / 2
    for _ in range(LossScale.GROWTH_STEPS):
        scale.update(finite=True)
    assert scale.value == LossScale.START
    unused = LossScale("bf16")
    unused.update(finite=False)
    assert unused.value == 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precisions_train_to_nearly_the_same_loss(precision: str) -> None:
    batch = Noise().batch(0)
    bounds = []
    for how in ("fp32", precision):
        trainer = DVAETrainer(MODEL, training(precision=how), device=torch.device("cpu"))
        for _ in range(5):
            trainer.update(batch)
        bounds.append(float(trainer.hard(batch).value))
    assert bounds[1] == pytest.approx(bounds[0], abs=0.05)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"batch_samples": 0}, {"clip_norm": -1.0}, {"clip_norm": float("nan")}]
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        training(**wrong)


def test_the_defaults_are_the_papers() -> None:
    schedule = DVAESchedule()
    assert schedule.at(0) == {"tau": 1.0, "beta": 0.0, "lr": 1e-4}
    assert schedule.beta(5_000) == schedule.beta(3_000_000) == 6.6
    assert schedule.tau(150_000) == schedule.tau(3_000_000) == 1 / 16
    assert schedule.lr(1_200_000) == schedule.lr(3_000_000) == 1.25e-6
    assert schedule.tau(75_000) == pytest.approx((1 + 1 / 16) / 2)
    how = DVAETraining()
    assert (how.steps, how.batch_samples, how.averaging.decay) == (3_000_000, 512, 0.999)
