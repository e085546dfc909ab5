"""Rate limits that several ingress replicas share: one actor has the buckets."""

import asyncio
from typing import Any

from pipelines.sampling.rate_limits import RateLimits, TokenBuckets

NAME, NAMESPACE = "manray-rate-limits", "manray"
# It answers in a millisecond; whoever waits longer is refused instead of let through.
PATIENCE_SECONDS = 2.0


class SharedBudget:
    """A `PictureBudget` of a cluster: every ingress replica makes one and gets the same actor.

    An actor that dies is started again with full buckets. Any error is the caller's to refuse by.
    """

    def __init__(self, limits: RateLimits) -> None:
        import ray

        # Not decorators: Ray is imported only by those who serve.
        self._actor: Any = (
            ray.remote(TokenBuckets)
            .options(
                name=NAME,
                namespace=NAMESPACE,
                get_if_exists=True,
                num_cpus=0,
                max_restarts=-1,
                max_task_retries=0,  # a retried call would take the pictures twice
            )
            .remote(limits)
        )

    async def take(self, holder: str, pictures: int) -> float:
        """See `PictureBudget`."""
        answer = self._actor.take.remote(holder, pictures)
        return float(await asyncio.wait_for(answer, PATIENCE_SECONDS))

    async def give_back(self, holder: str, pictures: int) -> None:
        """See `PictureBudget`."""
        self._actor.give_back.remote(holder, pictures)
