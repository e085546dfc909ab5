"""Losses that jump: told from noise, and what a training does about them."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.training.prior_loop import train_prior
from pipelines.training.prior_training import Cadence, PriorTraining
from pipelines.training.spikes import DataPosition, SpikeConfig, SpikeDetector
from pipelines.training.token_loader import TokenBatch
from tests.fixtures.tiny_training import MODEL, learnable_batch, tiny_training


def falling_losses(seed: int, updates: int) -> list[float]:
    """A curve like the prior's: falls by a power law, with noise that is not quite normal."""
    rng = random.Random(seed)
    return [
        3 + 4 * (step + 1) ** -0.3 + 0.05 * rng.gauss(0, 1) * rng.choice((1, 1, 1, 2))
        for step in range(updates)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_a_clean_run_is_no_spike(seed: int) -> None:
    detector = SpikeDetector(SpikeConfig(patience=1))
    assert not any(detector.look(loss) for loss in falling_losses(seed, 10_000))


def test_a_spike_is_told_after_its_patience_and_once() -> None:
    detector = SpikeDetector(SpikeConfig(patience=3))
    clean = falling_losses(0, 400)
    told = [detector.look(loss) for loss in clean]
    told += [detector.look(clean[-1] + 1.5) for _ in range(6)]
    told += [detector.look(loss) for loss in falling_losses(1, 50)]
    assert [index for index, value in enumerate(told) if value] == [402]


def test_one_bad_batch_is_borne_and_a_new_level_is_no_spike_for_ever() -> None:
    detector = SpikeDetector(SpikeConfig(window=32, patience=3))
    losses = [3.0 + 0.01 * (step % 7) for step in range(64)]
    assert not any(detector.look(loss) for loss in [*losses, 9.0, 3.0, 9.0, 3.0])
    told = [detector.look(loss + 2) for loss in losses * 3]
    assert sum(told) == 1


def test_losses_that_are_not_numbers_are_left_to_the_finite_gate() -> None:
    detector = SpikeDetector(SpikeConfig(window=8, patience=1))
    for _ in range(20):
        assert not detector.look(2.0)
    assert not detector.look(math.nan)
    assert detector.losses == [2.0] * 8
    assert detector.look(math.inf)
    assert math.inf not in detector.losses


def test_what_a_detector_knows_survives() -> None:
    losses = [*falling_losses(0, 200), 9.0, 9.0, 9.0]
    whole, first = SpikeDetector(SpikeConfig()), SpikeDetector(SpikeConfig())
    told = [whole.look(loss) for loss in losses]
    for loss in losses[:150]:
        first.look(loss)
    second = SpikeDetector(SpikeConfig())
    second.load_state_dict(first.state_dict())
    assert [second.look(loss) for loss in losses[150:]] == told[150:]
    assert told[-1]


def test_batches_that_are_left_out_are_never_taken_again() -> None:
    position = DataPosition()
    taken = iter(position)
    assert [next(taken) for _ in range(3)] == [0, 1, 2]
    position.leave_out(-5, 1)
    position.leave_out(4, 6)
    position.leave_out(6, 7)
    other = DataPosition()
    other.load_state_dict(position.state_dict())
    assert [next(taken) for _ in range(4)] == [3, 7, 8, 9]
    assert [other.take() for _ in range(4)] == [3, 7, 8, 9]


# A training that learns one batch by heart, until others make the loss jump.
BAD = range(30, 36)
SPIKES = SpikeConfig(window=16, patience=2, rewind=True, skip_before=2, skip_after=5, deviations=3)
STEPS = 50


class Killed(Exception):
    pass


class Batches:
    """The same batch again and again, but for some with other pictures."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def batch(self, number: int) -> TokenBatch:
        self.asked.append(number)
        good = learnable_batch(0, MODEL, 8)
        if number not in BAD:
            return good
        return TokenBatch(good.text_tokens, (good.image_tokens + 5) % MODEL.image_vocab_size)


def training(**spikes: Any) -> PriorTraining:
    config = SpikeConfig(**({f: getattr(SPIKES, f) for f in SPIKES.__dataclass_fields__} | spikes))
    return tiny_training(steps=STEPS, spikes=config)


def run(path: Path, how: PriorTraining, kill_at_log: int = 0) -> dict[str, Any]:
    told: dict[str, Any] = {"resumed": [], "notices": [], "losses": [], "odd": []}
    loader = Batches()

    def on_log(step: int, metrics: dict[str, float]) -> None:
        told["losses"].append((step, metrics["loss"]))
        if len(told["losses"]) == kill_at_log:
            raise Killed

    def on_weights(step: int, weights: dict[str, Tensor]) -> None:
        told["weights"] = weights

    told["asked"] = loader.asked
    train_prior(
        MODEL,
        how,
        cadence=Cadence(log_every=1, checkpoint_every=10, sample_every=1000),
        loader=loader,  # type: ignore[arg-type]
        device=torch.device("cpu"),
        checkpoints=path / "checkpoints",
        on_log=on_log,
        on_resume=lambda step, said: told["resumed"].append((step, said)),
        on_weights=on_weights,
        on_notice=lambda step, text: told["notices"].append((step, text)),
        on_odd=lambda step, batch, why: told["odd"].append((step, batch)),
    )
    return told


def test_a_training_goes_back_and_leaves_the_batches_around_a_spike_out(tmp_path: Path) -> None:
    told = run(tmp_path / "whole", training())
    first, again = told["resumed"]
    assert first == (0, [])
    step, said = again
    assert step == 30
    assert "THE LOSS HAS JUMPED" in said[-1]
    assert "batches 28 to 36 are left out" in said[-1]
    # Batches 30 and 31 were met once, before the training went back, and no bad one ever again.
    assert told["asked"] == [*range(32), *range(37, 37 + STEPS - 30)]
    last = dict(told["losses"])
    assert max(loss for step, loss in last.items() if step > 30) < last[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("whole"), training())


@pytest.mark.parametrize("kill_at_log", [31, 36])
def test_killed_before_and_after_it_went_back_it_ends_in_the_same_bits(
    whole: dict[str, Any], tmp_path: Path, kill_at_log: int
) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "killed", training(), kill_at_log)
    resumed = run(tmp_path / "killed", training())
    for name, value in whole["weights"].items():
        assert torch.equal(value, resumed["weights"][name])


def test_by_default_it_is_said_and_nothing_else_is_done(tmp_path: Path) -> None:
    told = run(tmp_path, training(rewind=False))
    ((step, text),) = told["notices"]
    assert step == 32
    assert "batches were 30 to 31" in text
    assert told["odd"][:2] == [(31, 30), (32, 31)]
    assert told["asked"] == list(range(STEPS))
