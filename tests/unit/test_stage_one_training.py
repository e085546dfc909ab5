"""The training loop of stage one. On two processes: tests/integration/test_stage_one_ranks.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.averaging import AveragingConfig
from models.dvae import DVAEConfig
from models.dvae_objective import DVAESchedule
from models.loss_scale import LossScale
from models.stage_one import StageOneConfig
from models.vqvae import VQVAEConfig
from models.vqvae_objective import QuantizerConfig, VQVAESchedule
from pipelines.training.picture_loader import PictureBatch
from pipelines.training.spoilers import SKIPS_IN_A_ROW
from pipelines.training.stage_one_loop import train_stage_one
from pipelines.training.stage_one_trainer import StageOneTrainer
from pipelines.training.stage_one_training import (
    DVAETraining,
    StageOneCadence,
    StageOneTraining,
    VQVAETraining,
)

SIZES: dict[str, Any] = {
    "image_size": 16,
    "vocab_size": 12,
    "n_hid": 8,
    "n_init": 6,
    "group_count": 3,
    "n_blk_per_group": 1,
}
STEPS = 6
CPU = torch.device("cpu")
COMMON: dict[str, Any] = {
    "steps": STEPS,
    "batch_samples": 4,
    "precision": "fp32",
    "clip_norm": 1.0,
    "averaging": AveragingConfig(decay=0.5, every=1),
}
KINDS = ("dvae", "vqvae", "vqvae-gradient")


def model(kind: str) -> StageOneConfig:
    return DVAEConfig(**SIZES) if kind == "dvae" else VQVAEConfig(**SIZES, code_width=5)


def training(kind: str = "dvae", **overrides: Any) -> StageOneTraining:
    values = COMMON | overrides
    if kind == "dvae":
        schedule = DVAESchedule(
            beta_steps=3, tau_steps=5, lr_start=1e-2, lr_steps=STEPS, warmup_steps=2
        )
        return DVAETraining(**({"schedule": schedule} | values))
    codebook: Any = "gradient" if kind == "vqvae-gradient" else "ema"
    how: dict[str, Any] = {
        "schedule": VQVAESchedule(lr_start=1e-2, lr_end=1e-3, lr_steps=STEPS, warmup_steps=2),
        "quantizer": QuantizerConfig(codebook=codebook, decay=0.8, revive_below=0.05),
    }
    return VQVAETraining(**(how | values))


def trainer_of(kind: str = "dvae", rank: int = 0, world_size: int = 1, **how: Any) -> Any:
    return StageOneTrainer(
        model(kind), training(kind, **how), device=CPU, rank=rank, world_size=world_size
    )


class Killed(Exception):
    pass


def noise(step: int, rank: int = 0, world_size: int = 1) -> Tensor:
    """Random pictures: a function of the step, like PictureLoader's."""
    generator = torch.Generator().manual_seed(step)
    pictures = torch.randint(256, (4, 16, 16, 3), dtype=torch.uint8, generator=generator)
    share = 4 // world_size
    return pictures[rank * share : (rank + 1) * share].permute(0, 3, 1, 2)


def run(
    path: Path,
    kind: str = "dvae",
    *,
    how: StageOneTraining | None = None,
    kill_at: int = 0,
    stop_at: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Any]:
    """Train, or break off at a step, or ask the last rank to stop; what the effects were told."""
    told: dict[str, Any] = {"log": {}, "resumed": [], "images": {}, "usage": {}}

    @contextmanager
    def batches(first: int, last: int) -> Iterator[Iterator[PictureBatch]]:
        yield (PictureBatch(noise(step, rank, world_size), step % 2) for step in range(first, last))

    def on_log(step: int, metrics: dict[str, float]) -> None:
        told["log"][step] = metrics
        if step == kill_at:
            raise Killed

    def on_images(step: int, images: dict[str, np.ndarray], usage: np.ndarray) -> None:
        told["images"][step], told["usage"][step] = images, usage

    told["weights"] = train_stage_one(
        model(kind),
        how or training(kind),
        cadence=StageOneCadence(log_every=1, checkpoint_every=2, images_every=3),
        batches=batches,
        keys=lambda step: [f"picture-{step}-{rank}-{place}" for place in range(4 // world_size)],
        shown=noise(0),
        device=CPU,
        rank=rank,
        world_size=world_size,
        checkpoints=path / "checkpoints",
        on_log=on_log,
        on_resume=lambda step, said: told["resumed"].append((step, said)),
        on_images=on_images,
        is_asked_to_stop=lambda: rank == world_size - 1 and stop_at in told["log"],
    )
    return told


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


TIMES = ("images_per_second", "data_wait", "unusable_pictures")


def losses(log: dict[int, dict[str, float]], step: int) -> dict[str, float]:
    return {name: value for name, value in log[step].items() if name not in TIMES}


def check_resumed(whole: dict[str, Any], resumed: dict[str, Any]) -> None:
    assert resumed["resumed"][0][0] == 4
    assert same(whole["weights"], resumed["weights"])
    for step in (5, 6):
        assert losses(whole["log"], step) == losses(resumed["log"], step)


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_and_resumed_training_ends_in_the_same_bits(kind: str, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", kind)
    with pytest.raises(Killed):
        run(tmp_path / "killed", kind, kill_at=5)
    check_resumed(whole, run(tmp_path / "killed", kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_training_has_a_checkpoint_and_goes_on(kind: str, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", kind)
    stopped = run(tmp_path / "stopped", kind, stop_at=2)  # asked before update 3
    assert stopped["weights"] is None
    assert list(stopped["log"]) == [1, 2, 3]
    resumed = run(tmp_path / "stopped", kind)
    assert resumed["resumed"][0][0] == 3
    assert same(whole["weights"], resumed["weights"])


def test_ranks_see_parts_of_one_batch_under_noise_of_their_own() -> None:
    whole = trainer_of().update(noise(0), report=True)
    halves = [trainer_of(rank=rank) for rank in (0, 1)]
    parts = [half.update(noise(0, rank, 2), report=True) for rank, half in enumerate(halves)]
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
    same_pictures = [
        trainer_of(rank=rank).update(noise(0), report=True).terms["hard_elb"] for rank in (0, 1)
    ]
    assert same_pictures[0] != same_pictures[1]


def test_a_vqvae_learns_the_same_from_two_halves_of_a_batch_as_from_the_whole() -> None:
    """Nothing in it is drawn, so that the sums over ranks must make the ranks one."""
    whole = trainer_of("vqvae", clip_norm=0.0)
    whole.objective.averages.config = QuantizerConfig(decay=0.8, revive_below=0)
    ranks = [trainer_of("vqvae", clip_norm=0.0) for _ in range(2)]
    parts = [noise(0)[:2], noise(0)[2:]]
    seen: list[Tensor] = []
    for rank, part in zip(ranks, parts, strict=True):
        pixels = part.float() / 255
        rank.objective.loss(pixels, step=0, generator=torch.Generator(), report=False)
        rank.objective.after_update(
            generator=torch.Generator(), sum_over_ranks=seen.append, is_first=True
        )
    whole.update(noise(0), report=False)
    together = seen[0] + seen[2]  # of each rank the sums of its features come before its spares
    uses = together[:, -1] * (1 - 0.8)
    torch.testing.assert_close(whole.objective.averages.uses, uses)


@pytest.mark.parametrize("kind", KINDS)
def test_training_raises_the_bound_and_shows_its_progress(kind: str) -> None:
    schedule = (
        DVAESchedule(tau_steps=5, lr_start=1e-2)
        if kind == "dvae"
        else VQVAESchedule(lr_start=1e-2, lr_end=1e-2)
    )
    trainer = trainer_of(kind, schedule=schedule)
    # Squares of one colour: noise could not be told from other noise by four codes a side.
    batch = noise(0)[:, :, ::8, ::8].repeat_interleave(8, 2).repeat_interleave(8, 3)
    before = float(trainer.update(batch, report=True).terms["reconstruction"])
    for _ in range(60):
        trainer.update(batch, report=False)
    loss = trainer.update(batch, report=True)
    assert float(loss.terms["reconstruction"]) > before + 0.1
    row = trainer.metrics(loss, {})
    if kind == "dvae":
        assert row["gap"] == pytest.approx(row["relaxed_elb"] - row["hard_elb"], abs=1e-6)
    assert 1 <= row["perplexity"] <= row["codes_used"] <= 12
    assert row["codes_used_share"] == row["codes_used"] / 12


@pytest.mark.parametrize("kind", KINDS)
def test_the_log_and_the_pictures_are_told(kind: str, tmp_path: Path) -> None:
    told = run(tmp_path, kind)
    assert set(told["log"]) == set(range(1, STEPS + 1))
    wanted = {"hard_elb", "reconstruction", "kl", "codes_used", "perplexity", "lr", "data_wait"}
    wanted |= {"relaxed_elb", "gap", "tau", "beta"} if kind == "dvae" else {"commitment"}
    assert wanted <= set(told["log"][1])
    assert told["log"][STEPS]["unusable_pictures"] == 3
    assert set(told["images"]) == {3, 6}
    shapes = {name: rows.shape for name, rows in told["images"][6].items()}
    names = ("original", "hard", "relaxed") if kind == "dvae" else ("original", "hard")
    assert shapes == dict.fromkeys(names, (4, 16, 16, 3))
    # Four pictures of 4 x 4 codes in each of the three updates since the last look.
    assert [int(usage.sum()) for usage in told["usage"].values()] == [192, 192]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_is_not_finite_changes_no_weight(kind: str) -> None:
    trainer = trainer_of(kind)
    trainer.update(noise(0), report=False)
    before = {name: value.detach().clone() for name, value in trainer.replica.parameters.items()}
    good = trainer._pixels
    trainer._pixels = lambda batch: good(batch) * float("nan")
    trainer.update(noise(1), report=False)
    assert same(
        before, {name: value.detach() for name, value in trainer.replica.parameters.items()}
    )
    assert (trainer.replica.skipped, trainer.skipped_in_a_row, trainer.step) == (1, 1, 2)
    trainer._pixels = good
    trainer.update(noise(2), report=False)
    assert trainer.skipped_in_a_row == 0
    assert not same(before, dict(trainer.replica.parameters))


def test_ten_such_batches_in_a_row_stop_the_run_by_name(tmp_path: Path) -> None:
    how = training(steps=30, schedule=DVAESchedule(beta_start=float("inf")))
    with pytest.raises(
        RuntimeError, match=f"{SKIPS_IN_A_ROW} updates in a row.*picture-0-0-0,.* and 20 more"
    ):
        run(tmp_path, how=how)


def test_the_pictures_that_spoil_updates_are_named_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil_the_third(self: StageOneTrainer, batch: Tensor) -> Tensor:
        pixels = batch.float() / 255
        pixels[2] = float("nan")
        return pixels

    monkeypatch.setattr(StageOneTrainer, "_pixels", spoil_the_third)
    with pytest.raises(RuntimeError, match="whose loss was not finite") as caught:
        run(tmp_path, how=training(steps=30))
    assert "picture-0-0-2, picture-1-0-2" in str(caught.value)
    assert "-0-0," not in str(caught.value)


def test_a_codebook_that_is_hardly_used_is_called_collapsed() -> None:
    trainer = trainer_of()
    loss = trainer.update(noise(0), report=True)
    for step, collapsed in ((3, 0.0), (4, 1.0)):  # the warm-up of beta has three updates
        trainer.replica.step = step
        trainer.counts = torch.zeros(1000, dtype=torch.int64)
        trainer.usage = torch.zeros_like(trainer.counts)
        trainer.counts[:9] = 50  # of 1,000 codes: less than one in a hundred
        assert trainer.metrics(loss, {})["codebook_collapsed"] == collapsed


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precisions_train_to_nearly_the_same_loss(precision: str, kind: str) -> None:
    bounds = []
    for how in ("fp32", precision):
        trainer = trainer_of(kind, precision=how)
        for _ in range(5):
            trainer.update(noise(0), report=False)
        bounds.append(float(trainer.update(noise(0), report=True).terms["hard_elb"]))
    assert bounds[1] == pytest.approx(bounds[0], abs=0.05)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"batch_samples": 0}, {"clip_norm": -1.0}, {"clip_norm": float("nan")}]
)
@pytest.mark.parametrize("kind", ["dvae", "vqvae"])
def test_impossible_settings_are_refused(wrong: dict[str, Any], kind: str) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        training(kind, **wrong)


def test_the_defaults_are_the_papers() -> None:
    schedule = DVAESchedule()
    assert schedule.at(0) == {"tau": 1.0, "beta": 0.0, "lr": 1e-4}
    assert schedule.beta(5_000) == schedule.beta(3_000_000) == 6.6
    assert schedule.tau(150_000) == schedule.tau(3_000_000) == 1 / 16
    assert schedule.lr(1_200_000) == schedule.lr(3_000_000) == 1.25e-6
    assert schedule.tau(75_000) == pytest.approx((1 + 1 / 16) / 2)
    how = DVAETraining()
    assert (how.steps, how.batch_samples, how.averaging.decay) == (3_000_000, 512, 0.999)
    assert how.betas == (0.9, 0.999)
    assert how.weight_decay == 1e-4
    other = VQVAETraining()
    assert (other.steps, other.batch_samples, other.schedule.lr(7)) == (250_000, 128, 2e-4)
    assert (other.quantizer.commitment, other.quantizer.decay) == (0.25, 0.99)
