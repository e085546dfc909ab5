"""Does the best of N candidates, by the reranker's score, fit its prompt more often than any one?

The question behind the paper's figures 6 and 9c. Whether a picture fits is asked of judges; one of
them, the thumbnails' distance (retrieval.py), is no network at all.

Letters: P prompts, M candidates of a prompt, N of them ranked at a time, J judges.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from pipelines.data.split import Split
from pipelines.evaluation import retrieval
from pipelines.evaluation.corpus import Corpus
from pipelines.sampling.drawing import SamplingConfig, check_seed
from pipelines.sampling.engine import Sampler
from pipelines.sampling.grid import captioned_rows
from pipelines.sampling.reranking import Reranker, best_first

THUMBNAILS = "thumbnails"
RERANKER = "reranker"
JUDGE = "judge"

Judge = Callable[[np.ndarray, int], np.ndarray]
"""Pictures (M, H, W, 3) made for a row of the corpus -> which are found there, (M,) bool."""


@dataclass(frozen=True, kw_only=True)
class BestOfNConfig:
    """What is measured."""

    prompts: int = 256
    """Captions of the corpus that pictures are sampled for."""
    pools: tuple[int, ...] = (1, 8, 64, 512)
    """Numbers of candidates of which the best is taken (paper, figure 6), smallest first."""
    grid_rows: int = 8
    """Prompts that are shown with the best of each number."""
    most_pictures: int = 10_000
    """Rows of the corpus that pictures are looked up in; a smaller corpus is taken whole."""
    split: Split = "all"
    """Rows that prompts are taken from and looked up in: train, validation, or all of them."""
    seed: int = 0
    """Chooses the prompts; a prompt's candidates have seeds that follow each other."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name in ("prompts", "grid_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.most_pictures < 2:
            raise ValueError(f"most_pictures must be at least 2, got {self.most_pictures}")
        pools = list(self.pools)
        if not pools or pools[0] < 1 or pools != sorted(set(pools)):
            raise ValueError(f"pools must rise from 1 or more, got {pools}")
        if any(self.most_candidates % pool for pool in pools):
            raise ValueError(
                f"the largest of pools must be a multiple of the others, got {pools}: its "
                "candidates are cut into groups of each"
            )

    @property
    def most_candidates(self) -> int:
        """Pictures that are sampled for each prompt."""
        return self.pools[-1]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The share of prompts whose best of N is found again, by judge, for each N."""

    pools: tuple[int, ...]
    share: dict[str, list[float]]
    half_width: dict[str, list[float]]
    """Half of the 95 % interval of each share, over prompts."""
    possible: dict[str, list[float]]
    """The share of groups of N with a candidate that the judge finds: no ranking reaches more."""
    prompts: int
    corpus_pictures: int
    grid: np.ndarray  # (H, W, 3) uint8

    def figures(self) -> dict[str, float]:
        """`JUDGE_retrieval_at_1_best_of_N` by name."""
        return {
            f"{judge}_retrieval_at_1_best_of_{pool}": value
            for judge, values in self.share.items()
            for pool, value in zip(self.pools, values, strict=True)
        }


def best_of_n(
    sampler: Sampler,
    reranker: Reranker,
    corpus: Corpus,
    config: BestOfNConfig,
    *,
    judge: Reranker | None,
    on_pictures: Callable[[int], None],
) -> Curve:
    """Sample M candidates a prompt and judge the best of every N of them.

    `judge` is a contrastive model that took no part in ranking. `on_pictures(count)` is called as
    pictures are sampled. Memory: M pictures at a time.
    """
    judges: dict[str, Judge] = {THUMBNAILS: _by_thumbnails(corpus)}
    if judge is not None:
        judges[JUDGE] = _by_captions(judge, corpus)
    judges[RERANKER] = _by_captions(reranker, corpus)
    rows = retrieval.choose_prompts(corpus.captions, config.prompts, config.seed)
    scores = np.empty((len(rows), config.most_candidates), np.float32)
    hits = {name: np.empty(scores.shape, bool) for name in judges}
    shown = []
    for place, row in enumerate(rows):
        caption = corpus.captions[row]
        seed = config.seed + place * config.most_candidates
        samples = sampler.sample(
            [caption], n=config.most_candidates, seed=seed, sampling=config.sampling
        )
        pictures = np.stack([sample.pixels for sample in samples[0]])
        scores[place] = reranker.scores(caption, pictures)
        for name, found in judges.items():
            hits[name][place] = found(pictures, row)
        if place < config.grid_rows:
            best = [pictures[best_first(scores[place, :pool])[0]] for pool in config.pools]
            shown.append((caption, [corpus.pictures[row], *best]))
        on_pictures(len(pictures))
    headings = ["prompt", "original", *(f"best of {pool}" for pool in config.pools)]
    return _curve(config.pools, scores, hits, len(corpus), captioned_rows(shown, headings=headings))


def _curve(
    pools: tuple[int, ...],
    scores: np.ndarray,
    hits: Mapping[str, np.ndarray],
    corpus_pictures: int,
    grid: np.ndarray,
) -> Curve:
    share: dict[str, list[float]] = {name: [] for name in hits}
    half_width: dict[str, list[float]] = {name: [] for name in hits}
    possible: dict[str, list[float]] = {name: [] for name in hits}
    for pool in pools:
        for name, found in hits.items():
            best = best_of_groups(scores, found, pool)  # (P,)
            share[name].append(float(best.mean()))
            half_width[name].append(float(1.96 * best.std() / len(best) ** 0.5))
            groups = found.reshape(len(found), -1, pool)
            possible[name].append(float(groups.any(axis=2).mean()))
    return Curve(
        pools=pools,
        share=share,
        half_width=half_width,
        possible=possible,
        prompts=len(scores),
        corpus_pictures=corpus_pictures,
        grid=grid,
    )


def best_of_groups(scores: np.ndarray, hits: np.ndarray, pool: int) -> np.ndarray:
    """For each row of (P, M) the share of its groups of `pool` whose best by score is a hit."""
    grouped = scores.reshape(len(scores), -1, pool)
    best = grouped.argmax(axis=2)[..., None]
    found = np.take_along_axis(hits.reshape(grouped.shape), best, axis=2)
    share: np.ndarray = found[..., 0].mean(axis=1)
    return share


def _by_thumbnails(corpus: Corpus) -> Judge:
    """The nearest picture of the corpus in 16 × 16 pixels is the caption's own."""
    thumbnails = retrieval.thumbnails(corpus.pictures)

    def found(pictures: np.ndarray, row: int) -> np.ndarray:
        nearest = retrieval.nearest(retrieval.thumbnails(pictures), thumbnails)
        return np.array([corpus.keys[place] == corpus.keys[row] for place in nearest])

    return found


def _by_captions(reranker: Reranker, corpus: Corpus) -> Judge:
    """The nearest caption of the corpus to a contrastive model is the picture's own."""
    captions = reranker.prompt_vectors(corpus.captions)

    def found(pictures: np.ndarray, row: int) -> np.ndarray:
        nearest: np.ndarray = (reranker.picture_vectors(pictures) @ captions.T).argmax(axis=1)
        return nearest == row

    return found
