"""The thread in which a batch steps; orders come to it from anywhere."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from pipelines.sampling.batching import Batch
from pipelines.sampling.orders import Order

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Load:
    """How a batch is doing."""

    slots: int
    busy: int
    """Slots in use."""
    waiting: int
    """Pictures that have no slot yet."""
    steps: int
    """Since it was made."""
    drawn: int
    """Image tokens that came of them."""


def load_of(batch: Batch) -> Load:
    """How it is doing."""
    return Load(batch.slots, batch.busy_slots, batch.waiting, batch.steps, batch.drawn)


class BatchThread:
    """Steps a batch as long as there are orders; between steps it looks who came and who left."""

    def __init__(self, batch: Batch) -> None:
        self._batch, self._news = batch, deque[Callable[[], None]]()
        self._changed, self._ended = threading.Condition(), False
        self.error: Exception | None = None
        """What ended a step that should not have ended: the batch is not to be trusted any more."""
        self._thread = threading.Thread(target=self._run, name="batch", daemon=True)
        self._thread.start()

    def add(self, order: Order) -> None:
        """Let an order wait for slots; one that cannot be drawn is told so, as a ValueError."""

        def take() -> None:
            try:
                self._batch.add(order)
            except ValueError as error:
                order.tell(error)

        self._say(take)

    def drop(self, order: Order) -> None:
        """Forget an order before the next step; nothing happens if it is not there any more."""
        self._say(lambda: self._batch.drop(order))

    def load(self) -> Load:
        """How the batch is doing now."""
        return load_of(self._batch)

    def close(self) -> None:
        """End after the step that is running."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()

    def _say(self, news: Callable[[], None]) -> None:
        with self._changed:
            self._news.append(news)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or self._news or not self._batch.idle)
                if self._ended:
                    return
                news = [self._news.popleft() for _ in range(len(self._news))]
            for take in news:
                take()
            try:
                self._batch.step()
            except (
                Exception
            ) as error:  # told to all whom it concerns, and to whoever looks after us
                log.exception("a step of the batch failed")
                self.error = error
                self._batch.fail_all(error)
            # Python threads that wait for the interpreter get it here at the latest.
            time.sleep(0)
