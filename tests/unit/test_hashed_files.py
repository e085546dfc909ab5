"""What is hashed while it is written is what lies on the disk; no early failure is forgotten."""

import errno
import os
from array import array
from pathlib import Path

import pytest
import torch

from pipelines.data.storage import sha256_file
from pipelines.training import hashed_files
from pipelines.training.hashed_files import HashedFiles, Written


def test_files_have_the_size_and_hash_that_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashed_files, "SYNC_BYTES", 10_000)
    files = HashedFiles()
    with files.create_stream(tmp_path / "tensors", "wb") as stream:
        for size in (0, 1, 100, 5_000, 70_000):
            offset = stream.tell()
            torch.save(torch.arange(size), stream)  # type: ignore[arg-type]
            assert stream.tell() > offset
    with files.create_stream(tmp_path / "bytes.tmp", "wb") as stream:
        stream.write(memoryview(array("q", range(3000))))
        stream.write(b"end")
        stream.close()
    files.rename(tmp_path / "bytes.tmp", tmp_path / "bytes")
    assert sorted(files.written) == ["bytes", "tensors"]
    for name, written in files.written.items():
        file = tmp_path / name
        assert written == Written(file.stat().st_size, sha256_file(file))


def test_a_disk_that_fails_early_fails_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells of a failure once: the last sync would succeed."""
    failures = [OSError(errno.EIO, "the disk")]

    def fail_once(descriptor: int) -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setattr(os, "fdatasync", fail_once)
    monkeypatch.setattr(hashed_files, "SYNC_BYTES", 100)
    files = HashedFiles()
    with pytest.raises(OSError, match="the disk"), files.create_stream(tmp_path / "a", "wb") as to:
        to.write(bytes(200))
    assert not failures
    assert files.written == {}


def test_only_whole_files_are_told(tmp_path: Path) -> None:
    files = HashedFiles()

    def write_a_part() -> None:
        with files.create_stream(tmp_path / "a", "wb") as stream:
            stream.write(b"a part")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_a_part()
    assert files.written == {}
    with pytest.raises(ValueError, match="mode must be 'wb'"), files.create_stream("a", "ab"):
        pass
