"""Telling a loss that jumps from one that wavers."""

import statistics
from collections import deque

WINDOW = 200
FEWEST = 50  # losses before anything is called a spike
DEVIATIONS = 10.0  # of a normal distribution's; 1 in 10^23 by chance
NORMAL = 1.4826  # standard deviations in a median absolute deviation
LEAST = 1e-3  # share of the median that wavers in any case


class SpikeDetector:
    """Compares a loss with the median of those before, in median absolute deviations.

    A spike does not enter the window: a row of them stays a row of spikes, until so many have come
    that it is the new level.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._in_a_row = 0

    def is_spike(self, loss: float) -> bool:
        """Of a finite loss, to be told of every update's."""
        if len(self._losses) >= FEWEST and self._in_a_row < FEWEST and loss > self._limit():
            self._in_a_row += 1
            return True
        if self._in_a_row:
            if self._in_a_row >= FEWEST:
                self._losses.clear()
            self._in_a_row = 0
        self._losses.append(loss)
        return False

    def _limit(self) -> float:
        median = statistics.median(self._losses)
        deviation = statistics.median(abs(loss - median) for loss in self._losses)
        return median + DEVIATIONS * max(NORMAL * deviation, LEAST * abs(median))
