"""How fast a training goes, and what part of it waits for data."""

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

Batch = TypeVar("Batch")


class Pace:
    """Counts from a step on, and anew after every look at it."""

    def __init__(self, step: int) -> None:
        self._since, self._step, self._waited = time.monotonic(), step, 0.0

    def take(self, stream: Iterator[Batch]) -> Batch:
        """The stream's next batch; the time it takes counts as waiting."""
        self._waited -= time.monotonic()
        batch = next(stream)
        self._waited += time.monotonic()
        return batch

    def rates(self, step: int, batch_samples: int) -> dict[str, float]:
        """`images_per_second` over all ranks and `data_wait`, a share of the time."""
        elapsed = time.monotonic() - self._since
        pictures = (step - self._step) * batch_samples
        rates = {"images_per_second": pictures / elapsed, "data_wait": self._waited / elapsed}
        self._since, self._step, self._waited = time.monotonic(), step, 0.0
        return rates


def due(step: int, last: int) -> Callable[[int], bool]:
    """Whether something that is done every so many steps is done after this one, or at the end."""
    return lambda every: step % every == 0 or step == last
