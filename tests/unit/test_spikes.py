"""Telling a loss that jumps from one that wavers, and naming its samples."""

import random

from pipelines.training.spikes import FEWEST, SpikeDetector


def falling_losses(seed: int, count: int) -> list[float]:
    """As a training's: falling, noisy."""
    rng = random.Random(seed)
    return [3.0 + 5.0 / (1 + step / 50) + rng.gauss(0, 0.05) for step in range(count)]


def test_a_clean_training_raises_no_alarm() -> None:
    for seed in range(20):
        detector = SpikeDetector()
        assert not any(map(detector.is_spike, falling_losses(seed, 2000)))


def test_a_jump_is_found_at_once_and_what_follows_is_judged_as_before() -> None:
    losses = falling_losses(0, 1000)
    losses[600] += 2.0
    losses[700:703] = [9.0, 8.0, 7.0]
    detector = SpikeDetector()
    found = [step for step, loss in enumerate(losses) if detector.is_spike(loss)]
    assert found == [600, 700, 701, 702]


def test_a_level_that_stays_is_the_new_one_after_a_while() -> None:
    detector = SpikeDetector()
    losses = [1.0 + 0.01 * (step % 5) for step in range(500)] + [
        2.0 + 0.01 * (step % 5) for step in range(500)
    ]
    found = [step for step, loss in enumerate(losses) if detector.is_spike(loss)]
    assert found == list(range(500, 500 + FEWEST))


def test_equal_losses_are_no_reason_to_cry_at_the_next_bit() -> None:
    detector = SpikeDetector()
    assert not any(detector.is_spike(1.0) for _ in range(100))
    assert not detector.is_spike(1.0 + 1e-6)
    assert detector.is_spike(1.1)
