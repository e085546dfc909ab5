"""Schedules, plateau halving and iterate averaging."""

import math

import pytest
import torch
from torch import nn

from models.averaging import AveragingConfig, IterateAverage
from models.schedules import PlateauConfig, PlateauHalving, cosine, linear_warmup
from pipelines.training.optimizer import StepSize, build_optimizer
from pipelines.training.prior_training import PriorOptimizerConfig


def test_the_cosine_starts_ends_and_stays() -> None:
    assert cosine(0, start=1.0, end=1 / 16, steps=150_000) == 1.0
    assert cosine(75_000, start=1.0, end=0.0, steps=150_000) == pytest.approx(0.5)
    assert cosine(150_000, start=1.0, end=1 / 16, steps=150_000) == pytest.approx(1 / 16)
    assert cosine(10**7, start=1.0, end=1 / 16, steps=150_000) == pytest.approx(1 / 16)
    assert cosine(0, start=3.0, end=7.0, steps=0) == 7.0


def test_the_papers_step_size_warms_up_and_ends_at_a_thirty_second_of_its_peak() -> None:
    step_size = StepSize(PriorOptimizerConfig(), steps=430_000)
    assert step_size.at(4_999) == pytest.approx(4.5e-4)
    assert step_size.at(0) == pytest.approx(4.5e-4 / 5_000)
    for _ in range(7 * 5_000):  # a loss that never falls
        step_size.update(1.0)
    assert step_size.at(400_000) == pytest.approx(4.5e-4 / 32)


def test_a_falling_loss_is_no_plateau() -> None:
    plateau = PlateauHalving(PlateauConfig(window=10))
    for step in range(100):
        plateau.update(10.0 - 0.05 * step)
    assert plateau.factor == 1.0
    resumed = PlateauHalving(plateau.config)
    resumed.load_state_dict(plateau.state_dict())
    for _ in range(20):
        plateau.update(5.0)
        resumed.update(5.0)
    assert plateau.factor == resumed.factor < 1.0


def test_the_warmup_needs_no_steps() -> None:
    assert linear_warmup(0, 0) == 1.0


def test_the_average_forgets_the_initial_weights_and_keeps_the_decay() -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(100.0)
    average = IterateAverage(model.named_parameters(), AveragingConfig(decay=0.99, every=1))
    values = [math.sin(step) for step in range(1, 400)]
    for step, value in enumerate(values, start=1):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update(model.named_parameters(), step)
    recent = sum(0.01 * 0.99**age * value for age, value in enumerate(reversed(values)))
    assert float(average.shadow["weight"]) == pytest.approx(recent, abs=0.15)


def test_only_linear_weights_decay() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(2, 2), "text_embedding": nn.Embedding(2, 2)})
    groups = build_optimizer(model, PriorOptimizerConfig()).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    linear, embedding = model["linear"], model["text_embedding"]
    assert decay == {
        id(linear.weight): 4.5e-2,
        id(linear.bias): 0.0,
        id(embedding.weight): 0.0,
    }
