"""The buckets that all ingress replicas share, on a real Ray."""

import asyncio

import pytest

from jobs import rate_limits
from jobs.rate_limits import SharedBudget
from pipelines.sampling.rate_limits import RateLimits

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_nobody_is_refused_while_the_buckets_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process starts in a microsecond, in which one that runs shall answer here."""
    monkeypatch.setattr(rate_limits, "PATIENCE_SECONDS", 1e-6)

    async def ask_twice() -> None:
        budget = SharedBudget(RateLimits(pictures_per_minute=1.5, burst=2))
        assert await budget.take("someone", 1) == 0
        with pytest.raises(TimeoutError):
            await budget.take("someone", 1)

    asyncio.run(ask_twice())
