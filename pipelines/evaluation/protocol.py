"""One judgement of a prior: losses on a corpus, whether its pictures are found there, a grid."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from pipelines.data.split import Split
from pipelines.evaluation import retrieval
from pipelines.evaluation.corpus import Corpus
from pipelines.evaluation.losses import shuffle_captions, token_losses
from pipelines.sampling.drawing import SamplingConfig, check_seed
from pipelines.sampling.engine import Sample, Sampler
from pipelines.sampling.grid import captioned_rows

OnRows = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured."""

    prompts: int = 32
    """Captions of the corpus that a picture is sampled for, and looked up again."""
    grid_rows: int = 16
    """Prompts that are shown in the grid."""
    grid_samples: int = 4
    """Pictures of each of them."""
    most_pictures: int = 10_000
    """Rows of the corpus that are looked at; a smaller corpus is taken whole."""
    split: Split = "all"
    """Rows that are judged: train, validation, or all of them."""
    seed: int = 0
    """Chooses the prompts and is each one's first picture's."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name in ("prompts", "grid_rows", "grid_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.most_pictures < 2:
            raise ValueError(f"most_pictures must be at least 2, got {self.most_pictures}")

    def work(self, rows: int) -> int:
        """Pictures to be computed for a corpus of so many rows: two losses, the samples."""
        count = min(self.most_pictures, rows)
        prompts = min(self.prompts, count)
        return 2 * count + prompts + min(self.grid_rows, prompts) * self.grid_samples


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures and a picture of them."""

    figures: dict[str, float]
    grid: np.ndarray  # (H, W, 3) uint8


def evaluate(
    sampler: Sampler,
    corpus: Corpus,
    config: EvaluationConfig,
    *,
    batch_samples: int,
    on_rows: OnRows,
) -> Evaluation:
    """Judge a prior; `on_rows(count)` is called as pictures are done, `config.work` in all."""
    figures = _losses(sampler, corpus, batch_samples, on_rows)
    chosen = retrieval.choose_prompts(corpus.captions, config.prompts, config.seed)
    samples = _sample(sampler, corpus, chosen, 1, config, on_rows)
    first = [row[0].pixels for row in samples]
    decoded = sampler.decode(torch.from_numpy(corpus.image_tokens[chosen]))
    thumbnails = retrieval.thumbnails(corpus.pictures)
    figures |= {
        "retrieval_at_1": retrieval.share_of_hits(first, chosen, thumbnails, corpus.keys),
        "reconstruction_retrieval_at_1": retrieval.share_of_hits(
            list(decoded), chosen, thumbnails, corpus.keys
        ),
        "prompts": len(chosen),
        "corpus_pictures": len(corpus),
    }
    shown = chosen[: config.grid_rows]
    more = _sample(sampler, corpus, shown, config.grid_samples, config, on_rows)
    rows = [
        (corpus.captions[row], [corpus.pictures[row], decoded[place], *(s.pixels for s in made)])
        for place, (row, made) in enumerate(zip(shown, more, strict=True))
    ]
    headings = ["prompt", "original", "dVAE", *["sampled"] * config.grid_samples]
    return Evaluation(figures=figures, grid=captioned_rows(rows, headings=headings))


def _losses(
    sampler: Sampler, corpus: Corpus, batch_samples: int, on_rows: OnRows
) -> dict[str, float]:
    """The losses with the true captions, and the pictures' with other rows' captions."""
    image_tokens = torch.from_numpy(corpus.image_tokens)
    true, shuffled = (
        token_losses(
            sampler.prior,
            sampler.encode_prompts(captions),
            image_tokens,
            batch_samples=batch_samples,
            on_rows=on_rows,
        )
        for captions in (corpus.captions, shuffle_captions(corpus.captions))
    )
    return {
        "image_loss": true.image,
        "text_loss": true.text,
        "image_loss_shuffled_captions": shuffled.image,
    }


def _sample(
    sampler: Sampler,
    corpus: Corpus,
    rows: Sequence[int],
    n: int,
    config: EvaluationConfig,
    on_rows: OnRows,
) -> list[list[Sample]]:
    prompts = [corpus.captions[row] for row in rows]
    samples = sampler.sample(prompts, n=n, seed=config.seed, sampling=config.sampling)
    on_rows(n * len(rows))
    return samples
