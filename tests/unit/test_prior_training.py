"""The prior's training loop, on one process and on two gloo processes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from models.averaging import AveragingConfig
from models.prior import PriorConfig
from models.resblock_scaling import ResblockScales
from pipelines.data.plan import OutputConflict
from pipelines.training.checkpoint_files import COMPLETE, attempts
from pipelines.training.parallelize import resblock_gradients
from pipelines.training.prior_loop import train_prior
from pipelines.training.prior_trainer import PriorTrainer
from pipelines.training.prior_training import (
    Cadence,
    PowerSGDConfig,
    PriorOptimizerConfig,
    PriorTraining,
    ShardingConfig,
)
from pipelines.training.token_loader import TokenBatch
from tests.fixtures.ranks import run_ranks

MODEL = PriorConfig(
    n_layers=2,
    n_heads=2,
    d_model=16,
    text_len=6,
    text_vocab_size=20,
    grid=4,
    image_vocab_size=12,
    conv_kernel=3,
)
STEPS = 6


def training(**overrides: Any) -> PriorTraining:
    values: dict[str, Any] = {
        "steps": STEPS,
        "batch_samples": 4,
        "precision": "fp32",
        "resblock_scaling": "always",
        "optimizer": PriorOptimizerConfig(
            peak_lr=1e-2, warmup_steps=2, decay="cosine", moments="fp32"
        ),
        "averaging": AveragingConfig(decay=0.5, every=2),
        "recompute": "none",
    }
    return PriorTraining(**(values | overrides))


class Batches:
    """A loader of random tokens: batches are a function of the step, like TokenLoader's."""

    def __init__(self, rank: int = 0, world_size: int = 1, batch_samples: int = 4) -> None:
        self.rank, self.world_size, self.batch_samples = rank, world_size, batch_samples
        self.asked: list[int] = []

    def batch(self, step: int) -> TokenBatch:
        self.asked.append(step)
        generator = torch.Generator().manual_seed(step)
        text = torch.randint(2, 20, (self.batch_samples, MODEL.text_len), generator=generator)
        text[:, 0] = 1
        lengths = torch.randint(2, MODEL.text_len + 1, (self.batch_samples, 1), generator=generator)
        text = text.where(torch.arange(MODEL.text_len) < lengths, 0)
        image = torch.randint(0, 12, (self.batch_samples, MODEL.image_len), generator=generator)
        share = self.batch_samples // self.world_size
        part = slice(self.rank * share, (self.rank + 1) * share)
        return TokenBatch(text[part], image[part])


class Killed(Exception):
    pass


def run(
    path: Path,
    *,
    how: PriorTraining | None = None,
    kill_at: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Any]:
    """Train; what the effects were told."""
    told: dict[str, Any] = {"log": {}, "resumed": [], "weights": {}}
    loader = Batches(rank, world_size)

    def on_log(step: int, metrics: dict[str, float]) -> None:
        told["log"][step] = metrics
        if step == kill_at:
            raise Killed

    def on_weights(step: int, weights: dict[str, Tensor]) -> None:
        told["weights"] = weights

    train_prior(
        MODEL,
        how or training(),
        cadence=Cadence(log_every=1, checkpoint_every=2, sample_every=100),
        loader=loader,  # type: ignore[arg-type]
        device=torch.device("cpu"),
        checkpoints=path / "checkpoints",
        on_log=on_log,
        on_resume=lambda step, said: told["resumed"].append((step, said)),
        on_weights=on_weights,
    )
    return told


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_killed_and_resumed_training_ends_in_the_same_bits(
    tmp_path: Path, precision: str
) -> None:
    how = training(precision=precision)
    whole = run(tmp_path / "whole", how=how)
    with pytest.raises(Killed):
        run(tmp_path / "killed", how=how, kill_at=5)
    resumed = run(tmp_path / "killed", how=how)
    assert resumed["resumed"][0][0] == 4
    assert same(whole["weights"], resumed["weights"])
    for step in (5, 6):
        assert whole["log"][step]["loss"] == resumed["log"][step]["loss"]


def test_micro_batches_change_nothing_but_rounding(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    parts = run(tmp_path / "parts", how=training(micro_batches=4))
    for step in range(1, STEPS + 1):
        for name in ("loss", "text_loss", "image_loss"):
            expected = whole["log"][step][name]
            assert parts["log"][step][name] == pytest.approx(expected, rel=1e-5), (step, name)


def test_a_training_goes_on_in_another_layout_but_not_with_other_settings(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", kill_at=5)
    with pytest.raises(OutputConflict, match='"seed": 1'):
        run(tmp_path / "killed", how=training(seed=1))
    sharding = ShardingConfig(group_size=1, keep_gathered=True)
    how = training(micro_batches=2, recompute="full", sharding=sharding)
    resumed = run(tmp_path / "killed", how=how)
    ((step, said),) = resumed["resumed"]
    assert step == 4
    assert "micro_batches 1 → 2, recompute none → full" in said[-1]
    assert "sharding.group_size 8 → 1" in said[-1]
    for step in (5, 6):
        expected = whole["log"][step]["loss"]
        assert resumed["log"][step]["loss"] == pytest.approx(expected, rel=1e-5)


def test_what_power_sgd_compresses_is_no_matter_of_layout() -> None:
    power_sgd = PowerSGDConfig(enabled=True)
    plain, other, compressed, in_fours = (
        training(sharding=ShardingConfig(group_size=size, power_sgd=how)).settings()
        for how in (PowerSGDConfig(), power_sgd)
        for size in (8, 4)
    )
    assert plain == other
    assert compressed != in_fours


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_bit(tmp_path: Path, recompute: str) -> None:
    kept = run(tmp_path / "kept")
    recomputed = run(tmp_path / "recomputed", how=training(recompute=recompute))
    assert same(kept["weights"], recomputed["weights"])


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "unfinished"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_taken(
    tmp_path: Path, damage: str
) -> None:
    with pytest.raises(Killed):
        run(tmp_path, kill_at=5)
    newest = attempts(tmp_path / "checkpoints")[0]
    victim = newest / "__0_0.distcp"
    if damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-10])
    elif damage == "flip":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "missing":
        victim.unlink()
    else:
        (newest / COMPLETE).unlink()
    told = run(tmp_path)
    step, said = told["resumed"][0]
    assert step == 2
    assert newest.name in said[0]


def test_a_gradient_that_is_not_finite_skips_the_update_and_halves_its_blocks_scale() -> None:
    trainer = PriorTrainer(MODEL, training(), torch.device("cpu"))
    before = {name: value.clone() for name, value in trainer.prior.named_parameters()}
    poisoned = trainer.prior.resblocks[1].c_fc.weight
    poisoned.register_hook(lambda gradient: gradient * float("inf"))
    scales = trainer.scales.values.clone()
    metrics = trainer.update(Batches().batch(0))
    assert metrics["skipped_updates"] == 1
    assert all(torch.equal(before[name], value) for name, value in trainer.prior.named_parameters())
    growth = trainer.training.scaling.growth
    expected = scales * growth
    expected[1] = scales[1] * 2**-0.5
    torch.testing.assert_close(trainer.scales.values, expected)


def test_resblock_scaling_changes_no_gradient_in_fp32() -> None:
    norms = {}
    for scaling in ("always", "never"):
        how = training(resblock_scaling=scaling)
        trainer = PriorTrainer(MODEL, how, torch.device("cpu"))
        norms[scaling] = trainer.update(Batches().batch(0))["grad_norm"]
    assert norms["always"] == pytest.approx(norms["never"], rel=1e-5)


def test_fp16_trains_with_resblock_scaling_where_it_loses_the_gradients_without(
    tmp_path: Path,
) -> None:
    losses = {}
    for scaling in ("fp16", "never"):
        how = training(precision="fp16", resblock_scaling=scaling, steps=STEPS)
        trainer = PriorTrainer(MODEL, how, torch.device("cpu"))
        batch = Batches().batch(0)
        # A loss as small as the last of 128 resblocks of a large batch sees it.
        with torch.autocast("cpu", torch.float16):
            total = trainer.prior(batch.text_tokens, batch.image_tokens).total * 2.0**-14
        total.backward()
        if scaling == "fp16":
            assert not trainer.scales.unscale_(resblock_gradients(trainer.prior)).any()
        weight = trainer.prior.resblocks[0].attn.c_attn.weight
        losses[scaling] = float((weight.grad != 0).float().mean())
    assert losses["fp16"] > 0.95
    assert losses["never"] < losses["fp16"] - 0.2


def test_a_scale_is_divided_once_in_its_patience_and_stays_in_its_limits() -> None:
    trainer = PriorTrainer(MODEL, training(), torch.device("cpu"))
    config = trainer.training.scaling
    scales = ResblockScales(2, config, torch.device("cpu"))
    infinite = [[torch.tensor([float("inf")])], [torch.tensor([1.0])]]
    for _ in range(config.patience):
        flags = scales.unscale_([[tensor.clone() for tensor in block] for block in infinite])
        scales.move(flags > 0)
    assert float(scales.values[0]) == pytest.approx(config.initial * config.backoff, rel=1e-5)
    assert float(scales.values[1]) == pytest.approx(
        config.initial * config.growth**config.patience, rel=1e-4
    )
    for _ in range(12_000):  # 2^(1/1000) a step: from 2^13 to 2^24 in 11,000
        scales.move(scales.unscale_([[torch.tensor([float("nan")])], []]) > 0)
    assert float(scales.values[0]) == config.lowest
    assert float(scales.values[1]) == config.highest


def _train_on_a_rank(rank: int, world_size: int, path: Path, kills: dict[str, int | None]) -> None:
    """Train once for each entry, in the directory of its name, killed at its step."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{path / 'store'}", rank=rank, world_size=world_size
    )
    for name, kill_at in kills.items():
        try:
            told = run(path / name.strip("+"), kill_at=kill_at, rank=rank, world_size=world_size)
        except Killed:
            continue
        if rank == 0:
            torch.save(told["weights"], path / f"{name}.pt")
            (path / f"{name}.json").write_text(json.dumps([told["resumed"], told["log"]]))
    dist.destroy_process_group()


def test_two_sharded_ranks_train_like_one_and_resume_in_the_same_bits(tmp_path: Path) -> None:
    one = run(tmp_path / "one")
    kills = {"two": None, "killed": 5, "killed+": None}
    run_ranks(_train_on_a_rank, (2, tmp_path, kills), 2)
    whole = torch.load(tmp_path / "two.pt", weights_only=True)
    assert same(whole, torch.load(tmp_path / "killed+.pt", weights_only=True))
    assert json.loads((tmp_path / "killed+.json").read_text())[0][0][0] == 4
    log = json.loads((tmp_path / "two.json").read_text())[1]
    for step in range(1, STEPS + 1):
        assert log[str(step)]["loss"] == pytest.approx(one["log"][step]["loss"], rel=1e-3)
    for name, value in one["weights"].items():
        torch.testing.assert_close(whole[name], value, rtol=0.05, atol=2e-3)


def test_a_training_on_two_ranks_goes_on_with_one(tmp_path: Path) -> None:
    run_ranks(_train_on_a_rank, (2, tmp_path, {"two": 5}), 2)
    told = run(tmp_path / "two")
    assert told["resumed"][0][0] == 4
    one = run(tmp_path / "one")
    assert told["log"][STEPS]["loss"] == pytest.approx(one["log"][STEPS]["loss"], rel=1e-3)
