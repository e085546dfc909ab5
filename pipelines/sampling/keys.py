"""Bearer keys: a file of names and SHA-256 digests, which can change while it is in use.

A key is 256 random bits, so a plain digest is as good as a slow one: nobody can try them all. Keys
are made here and shown once; words that a person chose would be guessable and have no place in it.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
from pathlib import Path

from pipelines.data.storage import replace_file

PREFIX = "sk-manray-"
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
LINE = re.compile(rf"({NAME.pattern})\s+([0-9a-f]{{64}})")
MOST_FILE_BYTES = 16 * 1024 * 1024

log = logging.getLogger(__name__)


class UnreadableKeys(Exception):
    """The file cannot be read just now: nobody is let in."""


class KeyFile:
    """The keys of a file, read again when it has changed."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError or OSError if there is no such file, or one without a key."""
        self._path = path
        self._state = _state(path)
        self._digests = read_keys(path)
        if not self._digests:
            raise ValueError(
                f"{path} must hold at least one key, got none: "
                f"python -m jobs.serve_keys add --keys {path} --name NAME"
            )

    def holder(self, key: str) -> str | None:
        """The name of a key, None if it is not in the file; raises UnreadableKeys."""
        digest = digest_of(key)
        found = None
        # All of them, whichever fits: the time says nothing about where it stands.
        for name, wanted in self._current().items():
            if hmac.compare_digest(digest, wanted):
                found = name
        return found

    def _current(self) -> dict[str, str]:
        try:
            if (state := _state(self._path)) != self._state:
                self._digests, self._state = read_keys(self._path), state
                log.warning("%s was read again: %d keys", self._path, len(self._digests))
        except (OSError, ValueError) as error:
            log.error("nobody is let in: %s", error)
            raise UnreadableKeys from error
        return self._digests


def read_keys(path: Path) -> dict[str, str]:
    """Digests by name; raises ValueError naming the line that is wrong."""
    with path.open(encoding="ascii", errors="replace") as file:
        lines = file.read(MOST_FILE_BYTES).splitlines()
    digests: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        found = LINE.fullmatch(line.strip())
        if not found or found[1] in digests:
            raise ValueError(
                f"{path}, line {number}, must be a new name and a key's SHA-256 in hexadecimal: "
                "use python -m jobs.serve_keys"
            )
        digests[found[1]] = found[2]
    return digests


def add_key(path: Path, name: str) -> str:
    """A new key, of which the file keeps the digest and nobody the key."""
    if not NAME.fullmatch(name):
        raise ValueError(f"name must be 1 to 64 of A-Z a-z 0-9 . _ -, got {name!r}")
    digests = read_keys(path) if path.exists() else {}
    if name in digests:
        raise ValueError(f"name must be new in {path}, but {name} is there: remove it first")
    key = PREFIX + secrets.token_urlsafe(32)
    _write(path, digests | {name: digest_of(key)})
    return key


def remove_key(path: Path, name: str) -> None:
    """End a key; servers that use the file notice at the next request."""
    digests = read_keys(path)
    if name not in digests:
        raise ValueError(f"name must be in {path}, got {name!r}; there: {', '.join(digests)}")
    del digests[name]
    _write(path, digests)


def digest_of(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def _write(path: Path, digests: dict[str, str]) -> None:
    lines = [f"{name} {digest}\n" for name, digest in digests.items()]
    replace_file(path, "".join(lines).encode())


def _state(path: Path) -> tuple[int, int, int]:
    """What differs when the file does: it is replaced as a whole."""
    found = os.stat(path)
    return found.st_ino, found.st_mtime_ns, found.st_size
