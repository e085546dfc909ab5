"""A request that comes twice under one Idempotency-Key is drawn once.

The answers live in this process, for a short time and up to a number of bytes: behind several
ingress processes a repeated request may meet another one, and is then drawn again.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from pipelines.sampling.openai_errors import ApiError

SECONDS_KEPT = 120.0
MOST_BYTES = 64 * 1024 * 1024
MOST_ENTRIES = 1024
MOST_KEY_CHARACTERS = 256


@dataclass
class _Entry:
    request: bytes
    """Digest of what was asked."""
    work: asyncio.Task[bytes]
    waiting: int = 0
    size: int = 0
    until: float = field(default=float("inf"))


class Answers:
    """Answers by key: those that are being made, and the latest that were made."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: dict[tuple[str, str], _Entry] = {}

    async def once(
        self, holder: str, key: str, request: bytes, make: Callable[[], Awaitable[bytes]]
    ) -> bytes:
        """What `make` gives; the same for whoever asks the same under the same key meanwhile.

        An answer that could not be made is not kept. The work ends when nobody waits for it.
        """
        if not 0 < len(key) <= MOST_KEY_CHARACTERS:
            raise ApiError(
                f"Idempotency-Key must have 1 to {MOST_KEY_CHARACTERS} characters, got {len(key)}.",
                code="invalid_idempotency_key",
            )
        self._forget()
        entry = self._entries.get((holder, key))
        if entry is None:
            entry = _Entry(request, asyncio.ensure_future(_run(make)))
            self._entries[holder, key] = entry
        elif entry.request != request:
            raise ApiError(
                "This Idempotency-Key was used for another request: use a new one.",
                code="idempotency_key_reused",
            )
        entry.waiting += 1
        try:
            answer = await asyncio.shield(entry.work)
            entry.size, entry.until = len(answer), self._clock() + SECONDS_KEPT
            return answer
        finally:
            entry.waiting -= 1
            if not entry.waiting and not _succeeded(entry.work):
                if self._entries.get((holder, key)) is entry:
                    del self._entries[holder, key]
                entry.work.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await entry.work

    def _forget(self) -> None:
        now = self._clock()
        kept = {key: entry for key, entry in self._entries.items() if entry.until > now}
        size = sum(entry.size for entry in kept.values())
        for key in list(kept):  # the oldest first
            if size <= MOST_BYTES and len(kept) < MOST_ENTRIES:
                break
            if kept[key].work.done():
                size -= kept.pop(key).size
        self._entries = kept


async def _run(make: Callable[[], Awaitable[bytes]]) -> bytes:
    return await make()


def _succeeded(work: asyncio.Task[bytes]) -> bool:
    return work.done() and not work.cancelled() and work.exception() is None
