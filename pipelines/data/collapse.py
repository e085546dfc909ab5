"""Noticing that the network died, before thousands of good rows are written off as failed."""

from collections import deque
from dataclasses import dataclass

from pipelines.data.causes import NETWORK, has_cause


class NetworkCollapsed(RuntimeError):
    """Nearly every fetch fails as if there were no network; nothing of the shard is committed."""


@dataclass(frozen=True, kw_only=True)
class CollapseConfig:
    """When a download stops instead of writing rows off.

    Shards are random samples of a list (pairs are sorted by hash), so a share this high is either
    a list that is dead as a whole or, far more often, a resolver or a line that is.
    """

    window: int = 200
    """Fetches of a shard that are looked at, the latest; 0 never stops. A shard with fewer is not
    watched."""
    share: float = 0.95
    """Share of them that failed by dns, timeout or connection at which the job stops."""

    def __post_init__(self) -> None:
        if self.window < 0:
            raise ValueError(f"collapse.window must not be negative, got {self.window}")
        if not 0 < self.share <= 1:
            raise ValueError(f"collapse.share must be in (0, 1], got {self.share}")


class CollapseWatch:
    """Counts the network's failures among the latest fetches."""

    def __init__(self, config: CollapseConfig) -> None:
        self.config = config
        self._latest: deque[str] = deque(maxlen=config.window)

    def saw(self, reason: str) -> None:
        """Count one URL that reached the network; `reason` is empty if it was fetched.

        Raises NetworkCollapsed.
        """
        window = self.config.window
        if not window:
            return
        self._latest.append(reason if has_cause(reason, NETWORK) else "")
        failed = sorted(filter(None, self._latest))
        if len(self._latest) == window and len(failed) >= self.config.share * window:
            most = max(dict.fromkeys(failed), key=failed.count)
            raise NetworkCollapsed(
                f"the network seems to be down: {len(failed)} of the last {window} fetches of a "
                f"shard failed, most with {most}. None of that shard's rows was written off. Mend "
                "the network or the resolver and run the same line again; if the list really is "
                "that dead, add --download.collapse.window 0"
            )
