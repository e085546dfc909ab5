"""How often a contrastive model finds a picture's caption among others, and the other way round."""

from collections.abc import Iterator, Sequence

import numpy as np

from pipelines.data.split import Split
from pipelines.data.stage import Manifest
from pipelines.evaluation.centre_squares import Square, centre_squares
from pipelines.sampling.reranking import BATCH, Reranker


def retrieval_at_1(
    reranker: Reranker, manifest: Manifest, *, split: Split, pairs: int
) -> dict[str, float]:
    """R@1 of `pairs` pairs of a filtered dataset among each other, both ways, and their number.

    A picture counts as found if the nearest caption reads as its own: captions may be equal. The
    pictures are in memory 64 at a time.
    """
    images, captions = [], []
    for squares in _batches(manifest, split, pairs, reranker.clip.config.image_size):
        images.append(reranker.picture_vectors(np.stack([square.pixels for square in squares])))
        captions += [square.caption for square in squares]
    cosines = np.concatenate(images) @ reranker.prompt_vectors(captions).T
    return {
        f"{split}_image_to_text_at_1": share_found(cosines, captions, captions),
        f"{split}_text_to_image_at_1": share_found(cosines.T, captions, captions),
        f"{split}_retrieval_pairs": len(captions),
    }


def share_found(cosines: np.ndarray, wanted: Sequence[str], captions: Sequence[str]) -> float:
    """The share of rows of (M, N) cosines whose largest has the wanted one of N captions."""
    hits = [
        captions[place] == caption for place, caption in zip(cosines.argmax(1), wanted, strict=True)
    ]
    return float(np.mean(hits))


def _batches(
    manifest: Manifest, split: Split, pairs: int, image_size: int
) -> Iterator[list[Square]]:
    batch: list[Square] = []
    for square in centre_squares(manifest, image_size, pairs, split):
        if square is not None:
            batch.append(square)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
