"""Pictures that kill or stop the decoder's C library cost their own row, not the job.

Decoding is done in the worker's own process, under a watchdog that ends the process when a call
does not return. The scheduler then starts the shard again; it finds the mark of an attempt that
never ended, and has its pictures decoded by a child, one at a time: the picture with which the
child dies, or does not come back, is the one. What else may have killed the first attempt (its
node, a lack of memory) makes the second one slower, and changes no row.
"""

import contextlib
import faulthandler
import json
import math
import multiprocessing
import pickle
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from pipelines.data.resize import ResizeConfig, Resized, resize_picture
from pipelines.data.stage import BEGUN
from pipelines.data.storage import Location

MOST_S = 120.0  # the largest picture that is accepted (50 million pixels) takes some seconds
OUR_FAULT = 1  # a child's exit code after a Python exception: no picture's fault

Resize = Callable[[bytes], Resized]


@contextlib.contextmanager
def attempt(place: Location, shard: str) -> Iterator[bool]:
    """Mark that a shard is being made; True if another attempt of it began and has not ended.

    An attempt that ends by an exception has ended; one whose process died has not.
    """
    marks = place / BEGUN
    before = [marks / entry.name for entry in marks.list() if entry.name.startswith(f"{shard}.")]
    mine = marks / f"{shard}.{uuid.uuid4().hex}"
    mine.put(b"")
    ended = [mine]
    try:
        yield bool(before)
        ended += before
    finally:
        with contextlib.suppress(OSError):  # a mark that stays makes the next attempt slower
            for mark in ended:
                mark.delete()


@contextlib.contextmanager
def resizer(config: ResizeConfig, *, careful: bool, most_s: float = MOST_S) -> Iterator[Resize]:
    """`resize_picture` with a watchdog or, if `careful`, in a child that may die.

    The child's rows are decoder_crash and decoder_timeout. Raises RuntimeError if the child fails
    by a Python exception.
    """
    resize: Resize = partial(resize_picture, config=config)
    decoder = _Child(resize, most_s) if careful else _Watched(resize, most_s)
    try:
        yield decoder.resize
    finally:
        decoder.end()


def serve(descriptor: int) -> None:
    """The child's whole life: the decoder, then pictures, until nobody asks any more."""
    connection: Connection = Connection(descriptor)
    with contextlib.suppress(EOFError, ConnectionError):
        resize: Resize = pickle.loads(connection.recv_bytes())  # noqa: S301  # from our own parent
        connection.send_bytes(b"ready")
        while True:
            resized = resize(connection.recv_bytes())
            connection.send_bytes(_words(resized))
            connection.send_bytes(resized.image)


def _words(resized: Resized) -> bytes:
    return json.dumps({k: v for k, v in asdict(resized).items() if k != "image"}).encode()


class _Watched:
    """Decodes in this process, and ends it when a picture takes `most_s`, or up to a tenth less.

    faulthandler's timer needs no Python, so that a C library which never gives Python its turn does
    not stop it. Every arming starts a thread, which costs a tenth of a picture: one arming is for
    all pictures of the next tenth of `most_s`. A thread of ours disarms it while none is decoded.
    """

    def __init__(self, resize: Resize, most_s: float) -> None:
        self._resize, self._most_s, self._tenth = resize, most_s, most_s / 10
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._decodes, self._armed_at = False, -math.inf
        self._thread = threading.Thread(target=self._disarm_when_idle, daemon=True)
        self._thread.start()

    def resize(self, data: bytes) -> Resized:
        with self._lock:
            self._decodes = True
            if time.monotonic() - self._armed_at > self._tenth:
                faulthandler.dump_traceback_later(self._most_s, exit=True, file=2)
                self._armed_at = time.monotonic()
        try:
            return self._resize(data)
        finally:
            self._decodes = False

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        self._disarm()

    def _disarm_when_idle(self) -> None:
        while not self._ended.wait(self._tenth):
            with self._lock:
                if not self._decodes:
                    self._disarm()

    def _disarm(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._armed_at = -math.inf


class _Child:
    """A process that decodes one picture at a time, and is started again when it has died."""

    def __init__(self, resize: Resize, most_s: float) -> None:
        self._task, self._most_s = pickle.dumps(resize), most_s
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection

    def resize(self, data: bytes) -> Resized:
        process = self._process or self._start()
        try:
            self._connection.send_bytes(data)
            if not self._connection.poll(self._most_s):
                self.end()
                return Resized(reason="decoder_timeout", detail=f"after {self._most_s:g} s")
            # JSON, not a pickle: whoever takes over a decoder must not have its parent too.
            said = json.loads(self._connection.recv_bytes())
            return Resized(**said | {"image": self._connection.recv_bytes()})
        except (EOFError, ConnectionError):
            code = process.wait()
            self.end()
            if code == OUR_FAULT:
                raise RuntimeError("the decoder's process failed, see its words above") from None
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return Resized(reason="decoder_crash", detail=name)

    def end(self) -> None:
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> "subprocess.Popen[bytes]":
        self._connection, theirs = multiprocessing.Pipe()
        paths = [str(Path(path).resolve()) for path in sys.path]
        command = f"import sys; sys.path[:] = {paths!r}\nfrom {__name__} import serve\n"
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"{command}serve({theirs.fileno()})"],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self._connection.send_bytes(self._task)
        try:
            self._connection.recv_bytes()  # the time that it takes to start is no picture's
        except EOFError:
            raise RuntimeError("the decoder's process did not start, see its words above") from None
        return self._process
