"""A batch in a process of its own, so that its steps need not wait for the interpreter.

A step is some hundred short calls of torch, and each lets go of Python's interpreter lock. Among
threads that answer requests and decode pictures it gets the lock back late, a hundred times a step.
"""

import logging
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import Any

import torch

from pipelines.sampling.batch_thread import Load, load_of
from pipelines.sampling.batching import Batch
from pipelines.sampling.orders import Drawn, Order

log = logging.getLogger(__name__)

SECONDS_TO_END = 5.0
PROGRAM = """import sys
from multiprocessing.connection import Connection
sys.path[:] = sys.argv[2:]
from pipelines.sampling.batch_process import main
main(Connection(int(sys.argv[1])))"""


class BatchProcess:
    """Steps a batch elsewhere as long as there are orders; they come and go between steps."""

    def __init__(self, make: Callable[[], Batch], on_end: Callable[[], None]) -> None:
        """`make` is called there, and raises here what it raises there.

        `on_end` is called once the process has ended though nobody closed it; whoever had an order
        has been told before.
        """
        self._line, line = Pipe()
        # Not a fork, which would share the state of Ray's threads and CUDA's; nor multiprocessing's
        # spawn, which would import the program that Ray runs here.
        program = [sys.executable, "-c", PROGRAM, str(line.fileno()), *sys.path]
        self._process = subprocess.Popen(
            program, pass_fds=[line.fileno()], stdin=subprocess.DEVNULL
        )
        line.close()
        self._line.send_bytes(pickle.dumps(make))
        self._orders, self._numbers = dict[int, Order](), dict[Order, int]()
        self._loads, self._sending = deque[Future[Load]](), threading.Lock()
        self._count, self._closed, self._on_end = 0, False, on_end
        self.error: Exception | None = None
        """What ended the process; then nothing is drawn any more."""
        self._wait_until_made()
        self._hearing = threading.Thread(target=self._hear, name="batch", daemon=True)
        self._hearing.start()

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def add(self, order: Order) -> None:
        """Let an order wait for slots; one that cannot be drawn is told so, as a ValueError."""
        self._count += 1
        self._orders[self._count], self._numbers[order] = order, self._count
        self._say("add", self._count, _fields(order))
        if self.error is not None:
            order.tell(self.error)

    def drop(self, order: Order) -> None:
        """Forget an order before the next step; nothing happens if it is not there any more."""
        number = self._numbers.pop(order, None)
        if number is not None:
            del self._orders[number]
            self._say("drop", number)

    def load(self) -> Load:
        """How the batch is doing after the step that is running. Raises what ended the process."""
        answer = Future[Load]()
        self._loads.append(answer)
        self._say("load")
        if self.error is not None:
            raise self.error
        return answer.result()

    def close(self) -> None:
        """End after the step that is running."""
        self._closed = True
        self._say("end")
        self._hearing.join(SECONDS_TO_END)
        self._end()

    def _wait_until_made(self) -> None:
        try:
            made = pickle.loads(self._line.recv_bytes())  # noqa: S301 - what our own process wrote
        except (EOFError, OSError):
            made = self._ended()
        if isinstance(made, Exception):
            raise made

    def _say(self, *message: Any) -> None:
        # Bytes: a Connection of torch's multiprocessing would send tensors as shared memory.
        with self._sending, suppress(OSError):  # it has ended: whoever hears it will say so
            self._line.send_bytes(pickle.dumps(message))

    def _hear(self) -> None:
        """In a thread: what the process tells, until it ends."""
        try:
            while True:
                said = pickle.loads(self._line.recv_bytes())  # noqa: S301
                if isinstance(said, Load):
                    self._loads.popleft().set_result(said)
                    continue
                number, event = said
                if order := self._orders.get(number):
                    order.tell(event)
        except (EOFError, OSError):  # it has ended
            if self._closed:
                return
        except Exception:  # who no longer understands it cannot go on with it either
            log.exception("the batch's process told something that cannot be taken")
        self.error = self._ended()
        log.error("%s", self.error)
        for answer in [*self._loads]:
            answer.set_exception(self.error)
        for order in [*self._orders.values()]:
            order.tell(self.error)
        self._on_end()

    def _ended(self) -> RuntimeError:
        return RuntimeError(f"the batch's process {self.pid} ended with {self._end()}")

    def _end(self) -> int:
        """See to it that the process ends; its status."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(SECONDS_TO_END)
        self._process.kill()
        return self._process.wait()


def main(line: Connection) -> None:
    """The process: step as long as there are orders, look for news between steps."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it
    try:
        batch = pickle.loads(line.recv_bytes())()  # noqa: S301
    except Exception as error:  # whatever it is, it is raised again where it was asked for
        line.send_bytes(pickle.dumps(error))
        return
    line.send_bytes(pickle.dumps(load_of(batch)))
    orders = dict[int, Order]()
    with suppress(EOFError, BrokenPipeError):  # whoever asked has ended
        while True:
            while batch.idle or line.poll():
                name, *arguments = pickle.loads(line.recv_bytes())  # noqa: S301
                if name == "end":
                    return
                if name == "load":
                    line.send_bytes(pickle.dumps(load_of(batch)))
                elif name == "add":
                    _add(batch, orders, line, *arguments)
                elif order := orders.pop(arguments[0], None):
                    batch.drop(order)
            try:
                batch.step()
            except Exception as error:
                batch.fail_all(error)
                raise


def _add(
    batch: Batch, orders: dict[int, Order], line: Connection, number: int, fields: dict[str, Any]
) -> None:
    def tell(event: Drawn | Exception) -> None:
        line.send_bytes(pickle.dumps((number, event)))

    fields |= {name: torch.from_numpy(fields[name]) for name in ("text_tokens", "primed")}
    order = orders[number] = Order(**fields, tell=tell)
    try:
        batch.add(order)
    except ValueError as error:
        tell(error)


def _fields(order: Order) -> dict[str, Any]:
    """Of an order, as they travel: tensors as arrays, which takes a tenth of the time."""
    return {
        "text_tokens": order.text_tokens.numpy(),
        "seeds": order.seeds,
        "sampling": order.sampling,
        "primed": order.primed.numpy(),
        "moments": order.moments,
        "shown": order.shown,
        "deadline": order.deadline,  # the machine's clock, the same in all processes
    }
