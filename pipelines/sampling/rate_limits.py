"""How many pictures a key may have: a bucket of pictures that fills at a steady rate.

What counts is what is drawn, a pool's candidates too, because that is what costs.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class RateLimits:
    """Of each key; all requests share one bucket where there are no keys."""

    pictures_per_minute: float = 0.0
    """Pictures that may be drawn in the long run; 0: no limit."""
    burst: int = 64
    """Pictures that may be drawn at once after a pause."""

    def __post_init__(self) -> None:
        if not 0 <= self.pictures_per_minute < 1e9:
            raise ValueError(
                f"pictures_per_minute must be 0 or more, got {self.pictures_per_minute}"
            )
        if self.burst < 1:
            raise ValueError(f"burst must be at least 1, got {self.burst}")


class PictureBudget(Protocol):
    """Whom to ask before drawing; one for all replicas that share the limits."""

    async def take(self, holder: str, pictures: int) -> float:
        """0 if the pictures may be drawn, else the seconds until they may be."""
        ...

    async def give_back(self, holder: str, pictures: int) -> None:
        """Of a request that was not drawn after all."""
        ...


class TokenBuckets:
    """The buckets by name, of this process."""

    def __init__(self, limits: RateLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._full_at: dict[str, float] = {}
        """When a bucket will be full again; a bucket that is full has no entry."""

    def take(self, holder: str, pictures: int) -> float:
        """0 if the pictures may be drawn, else the seconds until they may be."""
        if not self._limits.pictures_per_minute:
            return 0.0
        now, full_at = self._clock(), self._full_at.get(holder, 0.0)
        # Filling takes `burst` pictures' time at most: what is asked for must fit in what is left.
        after = max(now, full_at) + self._seconds(pictures)
        wait = after - (now + self._seconds(self._limits.burst))
        if wait > 1e-9:
            return wait
        self._full_at[holder] = after
        if len(self._full_at) > 1024:
            self._full_at = {name: when for name, when in self._full_at.items() if when > now}
        return 0.0

    def give_back(self, holder: str, pictures: int) -> None:
        """As if they had not been taken."""
        if holder in self._full_at:
            self._full_at[holder] -= self._seconds(pictures)

    def _seconds(self, pictures: int) -> float:
        return pictures * 60.0 / self._limits.pictures_per_minute


class LocalBudget:
    """A `PictureBudget` of this process alone."""

    def __init__(self, buckets: TokenBuckets) -> None:
        self._buckets = buckets

    async def take(self, holder: str, pictures: int) -> float:
        """See `PictureBudget`."""
        return self._buckets.take(holder, pictures)

    async def give_back(self, holder: str, pictures: int) -> None:
        """See `PictureBudget`."""
        self._buckets.give_back(holder, pictures)
