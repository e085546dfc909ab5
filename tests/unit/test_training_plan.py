"""The plan of a training: its figures, what it asks for, and what it advises."""

import shlex
from dataclasses import replace
from typing import Any

import pytest

from jobs import train_prior
from jobs.configs.train_prior import PRESETS
from models.prior import PriorConfig
from pipelines.training.plan_advice import nearest_that_fits
from pipelines.training.plan_memory import Setting
from pipelines.training.training_plan import (
    GIB,
    PlanConfig,
    TrainingPlan,
    flop_per_picture,
    plan_training,
    repeated_flop_per_picture,
)


def plan_of(preset: str, **config: Any) -> TrainingPlan:
    job = PRESETS[preset][1]
    return plan_training(
        job.prior, job.training, job.workers.num_workers, PlanConfig(**config), device="cuda"
    )


def test_the_paper_s_training_by_its_own_numbers() -> None:
    plan = plan_of("12b")
    assert plan.tokens == 430_000 * 1024 * 1280
    # 6 N D would be 4.16e22: embeddings take part in no product, attention does.
    assert plan.flop == pytest.approx(4.15e22, rel=0.01)
    # 16-bit moments of the matrices, fp32 weights and average: 12 bytes, and 16 of all else.
    assert plan.checkpoint_bytes == pytest.approx(12 * 12.09e9 + 16 * 0.2e9, rel=0.01)
    assert plan.setting.shards == 8


def test_attention_is_a_hundredth_of_the_12b_s_work() -> None:
    config = PriorConfig()
    matrices = 6 * 12 * config.n_layers * config.d_model**2 * config.stream_len
    heads = 6 * config.d_model * (255 * 16384 + 1024 * 8192)
    assert 0.005 < flop_per_picture(config) / (matrices + heads) - 1 < 0.02


def test_full_recomputation_costs_a_fifth_and_selective_a_hundredth() -> None:
    job = PRESETS["12b"][1]
    share = {}
    for recompute in ("none", "selective", "full"):
        training = replace(job.training, recompute=recompute)
        setting = Setting(model=job.prior, training=training, workers=1024)
        share[recompute] = repeated_flop_per_picture(setting) / flop_per_picture(job.prior)
    assert share["none"] == 0
    assert share["selective"] < 0.01
    assert 0.19 < share["full"] < 0.20


def test_time_price_and_failures_follow_from_the_rates() -> None:
    plan = plan_of("12b", mfu=(0.4,), price_per_gpu_hour=2.0)
    (at,) = plan.durations
    assert at.gpu_hours == pytest.approx(plan.flop / 0.4 / 989e12 / 3600)
    assert at.price == 2 * at.gpu_hours
    assert at.failures == at.gpu_hours / 50_700
    assert at.days == pytest.approx(at.gpu_hours / 1024 / 24)
    assert at.seconds_per_update * 430_000 == pytest.approx(at.days * 86_400)


def test_the_checkpoint_interval_is_the_one_that_loses_the_least() -> None:
    plan = plan_of("12b", checkpoint_gb_per_second=2.5)
    write, failure = plan.checkpoint_seconds(), plan.hours_to_failure * 3600
    assert write == pytest.approx(plan.checkpoint_bytes / 2.5e9)

    def lost(interval: float) -> float:
        """Share of the time: writes, and half an interval and a write at every failure."""
        return write / (interval + write) + (interval + write) / 2 / failure

    best = plan.checkpoint_interval()
    assert lost(best) < min(lost(0.8 * best), lost(1.25 * best))


def test_powersgd_saves_the_paper_s_share_and_pays_on_slow_networks_only() -> None:
    network = plan_of("12b").network
    assert network is not None
    # The paper: 86 % of what PowerSGD compresses; embeddings and heads are sent whole.
    assert 0.83 < 1 - network.compressed_bytes / network.whole_bytes < 0.86
    half = plan_of("12b", mfu=(0.25,)).network
    assert half is not None
    assert half.pays_below_gbit == pytest.approx(network.pays_below_gbit / 2)
    assert plan_of("1b").network is None
    assert plan_of("12b", gpus_per_node=4).group_spans_machines


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["12b", "--plan.card", "V100"], "group-size"),
        (["2.8b", "--plan.gpu-memory-gib", "24"], "--training."),
        (["small", "--training.recompute", "none", "--plan.gpu-memory-gib", "20"], "micro"),
        (["12b-one-gpu", "--training.recompute", "none"], "selective"),
    ],
)
def test_what_does_not_fit_is_refused_and_fits_with_the_change_that_is_advised(
    more: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_prior.main([*more, "--dry-run"]) == 2
    said = capsys.readouterr()
    assert "Memory of a worker" in said.out
    assert "does not fit: a worker must have" in said.err
    advised = said.err.split("the nearest change that does is ")[1].split(" (")[0]
    assert part in advised
    assert train_prior.main([*more, "--dry-run", *shlex.split(advised)]) == 0


def test_where_nothing_helps_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["12b", "--dry-run", "--workers.num-workers", "1", "--plan.card", "V100"]
    assert train_prior.main(arguments) == 2
    assert "no such change is enough" in capsys.readouterr().err


def test_advice_never_changes_the_batch_or_the_steps() -> None:
    job = PRESETS["2.8b"][1]
    setting = Setting(model=job.prior, training=job.training, workers=32)
    advice = nearest_that_fits(setting, 16 * GIB)
    assert advice is not None
    assert not [option for option in advice.options if "batch-samples" in option]
    assert not [option for option in advice.options if "steps" in option]


def test_a_plan_prints_prices_and_intervals_if_they_are_given(
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--plan.price-per-gpu-hour", "2", "--plan.checkpoint-gb-per-second", "5"]
    assert train_prior.main(["12b", "--dry-run"]) == 0
    without = capsys.readouterr().out
    assert train_prior.main(["12b", "--dry-run", *given]) == 0
    with_them = capsys.readouterr().out
    assert "price" in with_them.split("Time on")[1]
    assert "price" not in without.split("Time on")[1]
    assert "minutes loses the least" in with_them
    assert "--plan.checkpoint-gb-per-second" in without


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--workers.num-workers", "12", "--training.batch-samples", "24"], "groups of 8"),
        (["--workers.num-workers", "1000"], "batch_samples must divide"),
        (["--plan.mfu", "1.5"], "plan.mfu"),
    ],
)
def test_impossible_plans_are_refused_in_words(
    more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_prior.main(["12b", "--dry-run", *more]) == 2
    assert said in capsys.readouterr().err


def test_on_cpus_there_is_no_card_to_fit_and_no_rate_to_count_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["tiny", "--workers.device", "cpu", "--dry-run", "--plan.gpu-memory-gib", "5"]
    assert train_prior.main([*arguments, "--training.batch-samples", "65536"]) == 0
    said = capsys.readouterr().out
    assert "Memory of a worker" in said
    assert "H200" not in said.split("What is trained")[1]
