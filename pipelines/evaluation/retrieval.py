"""Does a picture made for a caption look like the caption's picture, more than like any other?"""

from collections import Counter
from collections.abc import Sequence

import cv2
import numpy as np

THUMBNAIL = 16


def thumbnails(pictures: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Pictures (N, S, S, 3) uint8 to (N, 16 · 16 · 3) float32: colours and their rough places."""
    size = (THUMBNAIL, THUMBNAIL)
    small = [cv2.resize(p, size, interpolation=cv2.INTER_AREA) for p in pictures]
    return np.stack(small).reshape(len(small), -1).astype(np.float32)


def nearest(queries: np.ndarray, corpus: np.ndarray) -> np.ndarray:
    """The corpus row (N, F) at the least L2 distance from each query (Q, F)."""
    return np.array([int(((corpus - query) ** 2).sum(axis=1).argmin()) for query in queries])


def share_of_hits(
    pictures: Sequence[np.ndarray], rows: Sequence[int], corpus: np.ndarray, keys: Sequence[str]
) -> float:
    """The share of pictures whose nearest thumbnail belongs to the pair it was made for."""
    found = nearest(thumbnails(pictures), corpus)
    hits = [keys[row] == keys[place] for row, place in zip(rows, found, strict=True)]
    return float(np.mean(hits))


def choose_prompts(captions: Sequence[str], count: int, seed: int) -> list[int]:
    """Rows to ask for, by captions that no other row has: at most `count`, at random."""
    often = Counter(captions)
    alone = [row for row, caption in enumerate(captions) if often[caption] == 1]
    if not alone:
        raise ValueError("captions must name pictures, but each occurs more than once")
    return np.random.default_rng(seed).permutation(alone)[:count].tolist()
