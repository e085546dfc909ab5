"""Files that are hashed from memory as they are written, while the disk is at work already.

Written first, then read again to be hashed and then synced, a checkpoint takes the sum of the
three; this way it takes little more than the slowest.
"""

import hashlib
import io
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from torch.distributed.checkpoint.filesystem import FileSystem
from torch.utils.serialization import config

SYNC_BYTES = 32 << 20
"""Written since the last time, so that it is worth while to ask the disk for them."""


class Written(NamedTuple):
    """A file as it was written."""

    bytes: int
    sha256: str


class HashedFiles(FileSystem):
    """The file system that a writer of torch.distributed.checkpoint writes to.

    A file is on the disk when its stream is closed.
    """

    def __init__(self) -> None:
        self.written: dict[str, Written] = {}
        """By name; of files that were written to their end."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """A new file. Raises what the disk says, a late word on an early part too."""
        if mode != "wb":
            raise ValueError(f"mode must be 'wb', got {mode!r}: this only writes")
        with (
            Path(path).open(mode) as file,
            ThreadPoolExecutor(1) as syncing,
            # The SHA-256 finds more.
            config.patch("save.compute_crc32", False),  # type: ignore[attr-defined]
        ):
            stream = _HashedStream(file, syncing)
            yield stream
            self.written[Path(path).name] = stream.settled()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


class _HashedStream(io.RawIOBase):
    """What is written to it goes to a file, from first to last byte.

    Closing it does nothing: writers close it before their block ends, whether or not all went well.
    """

    def __init__(self, file: IO[bytes], syncing: ThreadPoolExecutor) -> None:
        self._file, self._executor = file, syncing
        self._digest, self._bytes = hashlib.sha256(), 0
        self._asked, self._sync = 0, Future[None]()
        self._sync.set_result(None)

    def write(self, data: Any) -> int:
        self._file.write(data)
        self._digest.update(data)
        size = memoryview(data).nbytes
        self._bytes += size
        if self._bytes - self._asked >= SYNC_BYTES and self._sync.done():
            self._sync.result()  # the system tells a failure once
            self._asked = self._bytes
            self._sync = self._executor.submit(os.fdatasync, self._file.fileno())
        return size

    def tell(self) -> int:
        return self._bytes

    def settled(self) -> Written:
        """All of it is on the disk."""
        self._sync.result()
        self._file.flush()
        os.fsync(self._file.fileno())
        return Written(self._bytes, self._digest.hexdigest())
