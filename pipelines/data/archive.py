"""Reading tars that strangers made: members are streamed, and never become paths.

Only plain files are read. Links, devices, sparse files, names that leave the archive, names that
come twice, a broken checksum, an archive that is cut off: all are refused with the archive's name.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from pipelines.data.bad_files import BadFile

BLOCK = 512
MAX_EXTENDED_HEADER = 1 << 16
# What an extended header may not change, because we would have to follow it: where a member goes,
# how long it is, what it points to.
FORBIDDEN_RECORDS = (b" path=", b" linkpath=", b" size=", b" GNU.sparse")


@dataclass(frozen=True, kw_only=True)
class ArchiveLimits:
    """What an archive may hold."""

    max_members: int = 300_000
    """Members of one archive: three for each of 100,000 pairs."""
    max_member_bytes: int = 64 << 20
    """Bytes of one member."""

    def __post_init__(self) -> None:
        if self.max_members < 1 or self.max_member_bytes < 1:
            raise ValueError(
                "max_members and max_member_bytes must be at least 1, "
                f"got {self.max_members}, {self.max_member_bytes}"
            )


def read_members(path: Path, limits: ArchiveLimits) -> Iterator[tuple[str, bytes]]:
    """Names and contents, one member in memory at a time; raises BadFile as said above."""
    with path.open("rb") as file:
        seen: set[str] = set()
        while (info := _next_header(file, path)) is not None:
            if info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE):
                _check_extended(file, info, path)
                continue
            _check(info, path, limits)
            if info.name in seen:
                raise BadFile(path, f"must have each member once, got {info.name!r} twice")
            seen.add(info.name)
            if len(seen) > limits.max_members:
                raise BadFile(path, f"must have at most {limits.max_members:,} members")
            yield info.name, _read(file, info, path)


def _next_header(file: BinaryIO, path: Path) -> tarfile.TarInfo | None:
    at, block = file.tell(), file.read(BLOCK)
    if len(block) < BLOCK:
        raise BadFile(path, f"must be a whole tar, but it is cut off at byte {at}")
    if not block.strip(b"\0"):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise BadFile(path, f"must be an uncompressed tar; at byte {at}: {error}") from error


def _check_extended(file: BinaryIO, info: tarfile.TarInfo, path: Path) -> None:
    if not 0 <= info.size <= MAX_EXTENDED_HEADER:
        raise BadFile(path, f"has an extended header of {info.size:,} bytes")
    records = _read(file, info, path)
    for record in FORBIDDEN_RECORDS:
        if record in records:
            raise BadFile(path, f"has an extended header that sets {record.decode()[1:]!r}")


def _check(info: tarfile.TarInfo, path: Path, limits: ArchiveLimits) -> None:
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise BadFile(
            path, f"must hold plain files only, but {info.name!r} is of type {info.type!r}"
        )
    name = PurePosixPath(info.name)
    if name.is_absolute() or ".." in name.parts or "\\" in info.name or not info.name:
        raise BadFile(path, f"must have names within itself, got {info.name!r}")
    if not 0 <= info.size <= limits.max_member_bytes:
        raise BadFile(
            path,
            f"must have members of at most {limits.max_member_bytes:,} bytes, "
            f"but {info.name!r} has {info.size:,}",
        )


def _read(file: BinaryIO, info: tarfile.TarInfo, path: Path) -> bytes:
    padded = -(-info.size // BLOCK) * BLOCK
    content = file.read(padded)
    if len(content) < padded:
        raise BadFile(path, f"must be a whole tar, but it is cut off in {info.name!r}")
    return content[: info.size]
