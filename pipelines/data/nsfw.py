"""An operator's own judge of pictures: which of them a dataset should not have.

manray ships no such judge. It is named by its dotted name, sees pixels, and is asked in the pass
that decodes pictures. It fails closed: a judge that raises, or says something that is no
probability, ends the job, and no row of that shard is written.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.hooks import load_hook

REASON = "nsfw"
BATCH = 32  # pictures at a call; a shard's batches are always the same

Scorer = Callable[[list[np.ndarray]], Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class NsfwConfig:
    """Which pictures are dropped as not safe for work."""

    scorer: str = ""
    """Dotted name of a function, ``package.module:function``; empty: nothing is judged.

    It gets a list of pictures (H, W, 3) uint8 and answers a probability in [0, 1] for each. The
    name is a part of the dataset's settings; a judge that changes should have another name."""
    max_score: float = 0.5
    """Pictures with a higher score are dropped. Ours, and for the judge that is named."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_score <= 1:
            raise ValueError(f"max_score must be in [0, 1], got {self.max_score}")

    def load(self) -> Scorer | None:
        """The function, None if there is none; raises ValueError if it cannot be found."""
        return load_hook(REASON, self.scorer)


def scores(scorer: Scorer, pictures: list[np.ndarray]) -> list[float]:
    """A score for each picture; raises ValueError if the judge does not give that."""
    said: Any = scorer(pictures)
    try:
        found = [float(score) for score in said]
    except (TypeError, ValueError) as error:
        raise ValueError(f"the nsfw scorer must answer numbers, got {said!r:.100}") from error
    if len(found) != len(pictures) or not all(0 <= score <= 1 for score in found):
        raise ValueError(
            f"the nsfw scorer must answer {len(pictures)} probabilities in [0, 1], "
            f"got {found!r:.100}"
        )
    return found
