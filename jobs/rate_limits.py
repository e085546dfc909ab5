"""Rate limits that several ingress replicas share: one actor has the buckets."""

import asyncio
from typing import Any

from pipelines.sampling.rate_limits import RateLimits, TokenBuckets

NAMESPACE = "manray"
# It answers in a millisecond; whoever waits longer is refused instead of let through.
PATIENCE_SECONDS = 2.0
STARTING_SECONDS = 30.0  # before its first answer it is a process that starts on a busy machine


class SharedBudget:
    """A `PictureBudget` of a cluster: every ingress replica makes one and gets the same actor.

    The actor lives as long as the replica that happened to make it. When it ends, the next one who
    asks makes another, with full buckets. Any other error is the caller's to refuse by.
    """

    def __init__(self, limits: RateLimits) -> None:
        self._limits = limits
        self._limited = limits.pictures_per_minute > 0
        self._patience = STARTING_SECONDS
        if self._limited:
            self._actor = self._find()

    async def take(self, holder: str, pictures: int) -> float:
        """See `PictureBudget`."""
        if not self._limited:  # a call to another process costs a millisecond of both
            return 0.0
        from ray.exceptions import RayActorError

        try:
            return await self._take(holder, pictures)
        except RayActorError:
            self._actor, self._patience = self._find(), STARTING_SECONDS
            return await self._take(holder, pictures)

    async def give_back(self, holder: str, pictures: int) -> None:
        """See `PictureBudget`."""
        if self._limited:
            self._actor.give_back.remote(holder, pictures)

    async def _take(self, holder: str, pictures: int) -> float:
        async with asyncio.timeout(self._patience):
            seconds = float(await self._actor.take.remote(holder, pictures))
        self._patience = PATIENCE_SECONDS
        return seconds

    def _find(self) -> Any:
        import ray

        # Not decorators: Ray is imported only by those who serve.
        actor = ray.remote(TokenBuckets).options(
            name=actor_name(self._limits),
            namespace=NAMESPACE,
            get_if_exists=True,
            num_cpus=0,
            max_task_retries=0,  # a retried call would take the pictures twice
        )
        return actor.remote(self._limits)


def actor_name(limits: RateLimits) -> str:
    """Other limits have another actor: those who come with an update bring their own."""
    return f"manray-rate-limits-{limits.pictures_per_minute:g}-{limits.burst}"
