"""Files that are either whole or absent, on local disk or in S3."""

import errno
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from pipelines.data import s3

CHUNK_BYTES = 1 << 20
S3_SCHEME = "s3://"
ACCESS_KEY = re.compile(r"(?<![A-Z0-9])(AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])")
USER_AND_PASSWORD = re.compile(r"[a-z0-9+.-]+://[^/\s@]*@", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file that a listing found."""

    name: str
    """Path below the place that was listed."""
    bytes: int
    written: float
    """Unix seconds, by the store's clock."""


class Location:
    """A place in which files are: a local path, or `s3://bucket/key`.

    It holds no connection, so that it travels to workers. A local location behaves as its path.
    """

    __slots__ = ("_text",)

    def __init__(self, where: "str | os.PathLike[str] | Location") -> None:
        """Raises ValueError on another scheme, a missing bucket or credentials in the text."""
        text = str(where)
        refuse_secrets("a path", text)
        if not text.startswith(S3_SCHEME):
            if re.match(r"[a-z][a-z0-9+.-]*:/", text):
                # Path() has made one slash of two, also in "s3:/".
                raise ValueError(f"a path must be local or {S3_SCHEME}bucket/key, got {text}")
            self._text = str(Path(text))
            return
        bucket, _, key = text.removeprefix(S3_SCHEME).partition("/")
        parts = [part for part in key.split("/") if part]
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
            raise ValueError(f"{text} must name a bucket: {S3_SCHEME}bucket/key")
        if not parts or {".", ".."} & set(parts):
            raise ValueError(f"{text} must name a place in the bucket: {S3_SCHEME}bucket/key")
        self._text = S3_SCHEME + "/".join([bucket, *parts])

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Location({self._text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Location) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __truediv__(self, name: "str | Path") -> Self:
        return type(self)(f"{self._text}/{name}" if self.is_s3 else Path(self._text) / name)

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def is_s3(self) -> bool:
        return self._text.startswith(S3_SCHEME)

    @property
    def path(self) -> Path:
        """Raises ValueError for a place in S3."""
        if self.is_s3:
            raise ValueError(f"{self} must be on the local disk")
        return Path(self._text)

    @property
    def name(self) -> str:
        return self._text.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    def resolve(self) -> Self:
        """The same place from any working directory."""
        return self if self.is_s3 else type(self)(self.path.resolve())

    def read(self) -> bytes:
        """The whole file; raises FileNotFoundError."""
        return s3.get(*self.object_name()).data if self.is_s3 else self.path.read_bytes()

    def exists(self) -> bool:
        """True if there is a file of just this name (locally, or a directory)."""
        return s3.exists(*self.object_name()) if self.is_s3 else self.path.exists()

    def list(self) -> "list[Entry]":
        """All files below this place, by name; none if there is no such place."""
        if self.is_s3:
            bucket, key = self.object_name()
            start = len(key) + 1
            found = s3.listing(bucket, f"{key}/")
            return [Entry(name=k[start:], bytes=size, written=at) for k, size, at in found]
        return sorted(_walk(self.path), key=lambda entry: entry.name)

    def create_once(self, data: bytes) -> bool:
        """Write a file that must not exist yet; False if somebody was first."""
        return s3.create(*self.object_name(), data) if self.is_s3 else create_once(self.path, data)

    def replace(self, data: bytes) -> None:
        """Write a file whose older content may be replaced; readers see the old or the new."""
        if self.is_s3:
            s3.put(*self.object_name(), data)
        else:
            replace_file(self.path, data)

    def put(self, data: bytes) -> None:
        """Write a file under a name that nobody else uses; half of it may stay after a crash."""
        if self.is_s3:
            s3.put(*self.object_name(), data)
        else:
            _write_new(self.path, lambda file: file.write(data))
            _sync_directory(self.path.parent)

    def delete(self) -> None:
        """Remove a file; fine if there is none."""
        if self.is_s3:
            s3.delete(*self.object_name())
        else:
            self.path.unlink(missing_ok=True)

    def object_name(self) -> tuple[str, str]:
        """Bucket and key of a place in S3."""
        bucket, _, key = self._text.removeprefix(S3_SCHEME).partition("/")
        return bucket, key


class NoSpace(OSError):
    """What is to be written will not fit: found out before anything was written."""

    def __init__(self, words: str) -> None:
        super().__init__(errno.ENOSPC, words)

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        return type(self), (str(self.strerror),)


def refuse_secrets(what: str, value: Any) -> None:
    """Raise ValueError if a value, or one inside it, looks like credentials; they are not shown."""
    if isinstance(value, dict):
        for name, item in value.items():
            refuse_secrets(str(name), item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            refuse_secrets(what, item)
    elif isinstance(value, (str, os.PathLike, Location)):
        text = str(value)
        if ACCESS_KEY.search(text) or USER_AND_PASSWORD.search(text):
            raise ValueError(
                f"{what} must not hold credentials: a config is stored beside the data; set "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment instead"
            )


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def canonical_json(value: Any) -> bytes:
    """JSON with one spelling per value, so that equal values have equal digests."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1, allow_nan=False)
    return text.encode() + b"\n"


def create_once(path: Path, data: bytes) -> bool:
    """Write a file that must not exist yet; False if somebody was first.

    The bytes go to a private name, reach the disk, and are linked to the final one: `link` fails if
    the name is taken, so two writers cannot both win and no reader sees half a file.
    """
    temporary = _temporary_of(path)
    _write_new(temporary, lambda file: file.write(data))
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)  # a collector may have been there first
    _sync_directory(path.parent)
    return True


def replace_file(path: Path, data: bytes) -> None:
    """Write a file whose older content, if any, may be replaced; readers see the old or the new."""
    replace_file_by(path, lambda file: file.write(data))


def replace_file_by(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """`replace_file` with what `write` writes, which need not fit in memory."""
    temporary = _temporary_of(path)
    _write_new(temporary, write)
    os.replace(temporary, path)
    _sync_directory(path.parent)


def _temporary_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def _write_new(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """To the disk, under a name that must be free; nothing of it stays if writing fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _walk(folder: Path) -> list[Entry]:
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            file = Path(parent) / name
            try:
                status = file.stat()
            except FileNotFoundError:  # removed since by its owner
                continue
            relative = str(file.relative_to(folder))
            found.append(Entry(name=relative, bytes=status.st_size, written=status.st_mtime))
    return found
