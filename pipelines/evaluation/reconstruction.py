"""One judgement of a stage-one model: what its codes keep of pictures, and how it uses them.

Letters: B batch, S picture side, K codes, g grid side.
"""

import hashlib
import math
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from models.code_usage import code_counts, codes_used, perplexity
from models.dvae import DVAE
from models.dvae_objective import gumbel_noise, kl_to_uniform
from models.likelihood import display_pixels, picture_log_likelihood
from models.stage_one import StageOne, StageOneConfig
from pipelines.data.split import Split, rows_of
from pipelines.data.stage import Manifest
from pipelines.evaluation.centre_squares import Square, centre_squares
from pipelines.evaluation.frechet import FeatureNetwork, PairedSets, RunningGaussian
from pipelines.evaluation.picture_metrics import WINDOW, psnr, ssim

LEAST_PICTURES = 4  # two for the covariance of each half
PER_PICTURE = ("hard_elb", "hard_elb_training_beta", "reconstruction", "kl", "psnr", "ssim")
GROUPS = ("worst", "best", "random")

OnRows = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """What is measured."""

    most_pictures: int = 10_000
    """Pictures that are looked at, spread evenly; a smaller dataset is taken whole."""
    shown: int = 16
    """Pictures that are shown of each kind: the worst, the best, and some at random."""
    training_beta: float = 6.6
    """Weight of the divergence in the second of the two bounds (paper, A.2)."""
    frechet: bool = True
    """Measure FD-EffNetLite0 too, whose network comes with the extra `report`."""
    split: Split = "all"
    """Pictures that are judged: train, validation, or all of them."""
    seed: int = 0
    """Draws the codes of the bounds, and the pictures that are shown at random."""

    def __post_init__(self) -> None:
        if self.most_pictures < LEAST_PICTURES:
            raise ValueError(
                f"most_pictures must be at least {LEAST_PICTURES}, got {self.most_pictures}"
            )
        if self.shown < 1:
            raise ValueError(f"shown must be at least 1, got {self.shown}")
        if not 0 <= self.training_beta < math.inf:
            raise ValueError(f"training_beta must be at least 0, got {self.training_beta}")

    def check(self, manifest: Manifest, model: StageOneConfig) -> int:
        """The number of pictures that will be looked at; raises ValueError if there is no way."""
        rows = sum(map(len, rows_of(manifest, self.split)))
        if rows < LEAST_PICTURES:
            which = "" if self.split == "all" else f" of the split {self.split}"
            raise ValueError(
                f"{manifest.path} must hold at least {LEAST_PICTURES} pictures{which}, got {rows}"
            )
        if model.image_size < WINDOW:
            raise ValueError(
                f"the model's pictures must have at least {WINDOW} pixels a side, the window of "
                f"SSIM, got {model.image_size}"
            )
        return min(self.most_pictures, rows)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A picture that is shown, and what became of it."""

    original: Square
    made: np.ndarray  # (S, S, 3) uint8
    psnr: float
    ssim: float


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Figures, and pictures to look at."""

    figures: dict[str, float]
    standard_errors: dict[str, float]
    """Of those figures that are means over pictures."""
    pictures: int
    unusable: int
    """Pictures that gave no square and are not in any figure."""
    code_counts: list[int]
    """How often each code occurs."""
    shown: dict[str, list[Shown]]
    """Pictures by group."""


def measure(
    model: StageOne,
    manifest: Manifest,
    config: ReconstructionConfig,
    *,
    batch_samples: int,
    on_rows: OnRows,
) -> Judgement:
    """Judge a model on a filtered dataset; `on_rows(count)` is called as pictures are done.

    Memory: a batch, a shard's stored pictures, and those that are shown, whatever the dataset.
    Other batch sizes change figures by rounding alone.
    """
    count = config.check(manifest, model.config)
    tally = Tally(model, config)
    squares = centre_squares(manifest, model.config.image_size, count, config.split)
    # Convolutions in TF32, the default on a GPU, would round the figures themselves.
    exact = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    with exact:
        while batch := list(islice(squares, batch_samples)):
            usable = [square for square in batch if square is not None]
            tally.unusable += len(batch) - len(usable)
            if usable:
                tally.add(usable)
            on_rows(len(batch))
    if tally.pictures < LEAST_PICTURES:
        raise ValueError(
            f"{manifest.path} must hold at least {LEAST_PICTURES} pictures of "
            f"{model.config.image_size} pixels a side, got {tally.pictures} of {count}"
        )
    return tally.judgement()


class Tally:
    """What is kept of the pictures that were judged so far."""

    def __init__(self, model: StageOne, config: ReconstructionConfig) -> None:
        self.model, self.config = model, config
        self.device = next(model.parameters()).device
        self.network = FeatureNetwork(self.device) if config.frechet else None
        self.sets = PairedSets()
        self.values = RunningGaussian(len(PER_PICTURE))
        self.counts = torch.zeros(model.config.vocab_size, dtype=torch.int64, device=self.device)
        self.shown = {group: Lowest(config.shown) for group in GROUPS}
        self.unusable = 0

    @property
    def pictures(self) -> int:
        return self.values.count

    @torch.inference_mode()
    def add(self, squares: Sequence[Square]) -> None:
        """Judge a batch."""
        stacked = np.stack([square.pixels for square in squares])
        originals = torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous().to(self.device)
        seeds = [_seed(self.config.seed, square.key) for square in squares]
        bound, tokens, made = bound_and_picture(self.model, originals, seeds)
        reconstruction, kl = bound
        columns = {
            "hard_elb": reconstruction - kl,
            "hard_elb_training_beta": reconstruction - self.config.training_beta * kl,
            "reconstruction": reconstruction,
            "kl": kl,
            "psnr": psnr(originals, made),
            "ssim": ssim(originals, made),
        }
        values = torch.stack([columns[name].double() for name in PER_PICTURE], dim=1).cpu()
        for square, row in zip(squares, values, strict=True):
            if not row.isfinite().all():
                raise ValueError(
                    f"the model must give finite figures, but those of picture {square.key} "
                    f"are {dict(zip(PER_PICTURE, row.tolist(), strict=True))}"
                )
        self.values.add(values)
        self.counts += code_counts(tokens, len(self.counts))
        if self.network is not None:
            self.sets.add(self.network(originals), self.network(made))
        self._show(squares, made.permute(0, 2, 3, 1).cpu().numpy(), values)

    def judgement(self) -> Judgement:
        figures = dict(zip(PER_PICTURE, self.values.mean.tolist(), strict=True))
        errors = (self.values.covariance.diagonal() / self.pictures).sqrt().tolist()
        used = codes_used(self.counts)
        figures |= {
            "codes_used": used,
            "share_of_codes_used": used / len(self.counts),
            "perplexity": perplexity(self.counts),
        }
        if self.network is not None:
            figures |= self.sets.distances()
        return Judgement(
            figures=figures,
            standard_errors=dict(zip(PER_PICTURE, errors, strict=True)),
            pictures=self.pictures,
            unusable=self.unusable,
            code_counts=self.counts.tolist(),
            shown={group: lowest.kept for group, lowest in self.shown.items()},
        )

    def _show(self, squares: Sequence[Square], made: np.ndarray, values: Tensor) -> None:
        for square, pixels, row in zip(squares, made, values.tolist(), strict=True):
            figures = dict(zip(PER_PICTURE, row, strict=True))
            shown = Shown(original=square, made=pixels, psnr=figures["psnr"], ssim=figures["ssim"])
            self.shown["worst"].add(shown.psnr, shown)
            self.shown["best"].add(-shown.psnr, shown)
            self.shown["random"].add(_seed(self.config.seed, f"shown {square.key}"), shown)


class Lowest:
    """Keeps the pictures of the lowest scores, the lowest first."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._scored: list[tuple[float, str, Shown]] = []

    @property
    def kept(self) -> list[Shown]:
        return [shown for _, _, shown in self._scored]

    def add(self, score: float, shown: Shown) -> None:
        # The key makes equal scores' order that of no batch size.
        insort(self._scored, (score, shown.original.key, shown), key=lambda row: row[:2])
        del self._scored[self.count :]


def bound_and_picture(
    model: StageOne, originals: Tensor, seeds: Sequence[int]
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Of pictures (B, 3, S, S) uint8: the bound's parts, the codes (B, g, g), the pictures made.

    The parts are log density and divergence, each (B,), in nats per channel of a pixel. The dVAE's
    is that of codes drawn from the encoder, with a seed for each picture; the pictures are made of
    the most likely ones. The VQ-VAE's encoder is certain of its codes: against a uniform prior
    each of them costs ln K.
    """
    pixels = originals.float() / 255
    channels = pixels[0].numel()
    features = model.features(pixels)
    tokens = model.tokens_of(features)
    stats = model.stats(tokens)
    made = (display_pixels(stats.float()) * 255).round().to(torch.uint8)
    if isinstance(model, DVAE):
        kl = kl_to_uniform(features)
        drawn = torch.cat(
            [draw_codes(*pair) for pair in zip(features.split(1), seeds, strict=True)]
        )
        stats = model.stats(drawn)
    else:
        kl = pixels.new_full((len(pixels),), tokens[0].numel() * math.log(model.config.vocab_size))
    return (picture_log_likelihood(pixels, stats) / channels, kl / channels), tokens, made


def draw_codes(logits: Tensor, seed: int) -> Tensor:  # (1, K, g, g) -> (1, g, g)
    """Codes drawn from the categoricals of one picture's grid."""
    generator = torch.Generator(logits.device).manual_seed(seed)
    return (logits + gumbel_noise(logits, generator)).argmax(dim=1)


def _seed(seed: int, name: str) -> int:
    """63 bits that depend on the name and on nothing else, such as its place in a batch."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8]) >> 1
