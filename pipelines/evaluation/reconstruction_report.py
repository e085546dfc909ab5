"""The page of a stage-one model: its figures, how it uses its codes, the pictures it fails on.

See `pipelines/data/page.py` for what keeps a stranger's caption from being more than text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.data.page import inline_picture, short, write_page
from pipelines.evaluation.frechet import NAME as FD
from pipelines.evaluation.frechet import WIDTH
from pipelines.evaluation.reconstruction import GROUPS, Judgement, Shown
from pipelines.sampling.grid import captioned_rows

TEMPLATE = "reconstruction_report.html"
LARGEST_SIDE = 256  # of a picture in the page
QUALITY = 85
SMALLEST_SHARP_SIDE = 128  # smaller ones are magnified with their pixels visible
MAGNIFIED = 4  # differences are small numbers
GRID_ROWS = 5  # of each group in the grid
CHART_WIDTH, CHART_HEIGHT = 480.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 24.0, 12.0, 34.0  # margins of the chart
CURVE_POINTS = 200


@dataclass(frozen=True)
class Explained:
    """One row of the page's table."""

    key: str
    name: str
    unit: str
    digits: int
    better: str
    """Either "higher" or "lower", or empty."""
    says: str


NATS = "nats"  # per channel of a pixel
EXPLAINED = (
    Explained("hard_elb", "Hard ELB, β = 1", NATS, 4, "higher",
              "Lower bound of a picture's log density, with one-hot codes drawn from the encoder."),
    Explained("hard_elb_training_beta", "Hard ELB, β = {training_beta:g}", NATS, 4, "higher",
              "The same with the divergence weighted as in the dVAE's training."),
    Explained("reconstruction", "Reconstruction term", NATS, 4, "higher",
              "Log density of the pixels given the codes: the bound's first part."),
    Explained("kl", "KL", NATS, 4, "",
              "What the codes cost: divergence of their distribution from the uniform one; "
              "ln K a code for a VQ-VAE."),
    Explained("psnr", "PSNR", "dB", 2, "higher",
              "Peak signal-to-noise ratio over RGB of the most likely codes' picture, 8 bit; "
              "an equal picture counts 58.92 dB."),
    Explained("ssim", "SSIM", "", 4, "higher",
              "Structural similarity of the luma, 11×11 Gaussian window (Wang et al., 2004); "
              "1 is equal."),
    Explained("fd_effnetlite0", FD, "", 2, "lower",
              "Fréchet distance of originals and reconstructions in the features of "
              "EfficientNet-Lite0. Not comparable with a published FID, nor between unequal "
              "numbers of pictures."),
    Explained("fd_effnetlite0_halves", f"{FD}, halves", "", 2, "",
              "Baseline: how far two halves of the originals are apart by chance."),
    Explained("fd_effnetlite0_across", f"{FD}, across", "", 2, "lower",
              "One half of the originals against the other half's reconstructions: the nearer to "
              "the baseline, the less was lost."),
    Explained("codes_used", "Codes used", "", 0, "higher",
              "Codes that are the most likely one anywhere."),
    Explained("share_of_codes_used", "Share of codes used", "", 4, "higher",
              "Of the whole codebook."),
    Explained("perplexity", "Perplexity", "codes", 1, "higher",
              "exp of the entropy of the codes' frequencies: the codebook's size if all are "
              "equally frequent."),
)  # fmt: skip


def write_report(
    path: Path, judgement: Judgement, *, title: str, facts: dict[str, str], training_beta: float
) -> None:
    """Write the page; `facts` (what was judged, with what) are shown at its end."""
    content = {
        "title": title,
        "facts": facts,
        "judgement": judgement,
        "vocab_size": len(judgement.code_counts),
        "rows": [_table_row(row, judgement, training_beta) for row in EXPLAINED],
        "notes": notes(judgement),
        "chart": _rank_frequency(judgement.code_counts),
        "groups": [(group, [_tile(shown) for shown in judgement.shown[group]]) for group in GROUPS],
        "magnified": MAGNIFIED,
    }
    write_page(path, Path(__file__).parent / TEMPLATE, content)


def notes(judgement: Judgement) -> list[str]:
    """What a reader must know before the figures are believed."""
    found = []
    if "fd_effnetlite0" in judgement.figures and judgement.pictures <= 2 * WIDTH:
        found.append(
            f"{judgement.pictures:,} pictures are few for {FD}, which fits the covariance of "
            f"{WIDTH:,} features to each half of them: its distances are biased upwards. Compare "
            "them at equal numbers of pictures only, and with the baseline of the halves."
        )
    if judgement.unusable:
        found.append(
            f"{judgement.unusable:,} pictures were too small or broken and are in no figure."
        )
    return found


def grid(judgement: Judgement) -> np.ndarray:
    """Some of the shown pictures as one picture (H, W, 3) uint8."""
    rows = [
        (f"{group}, {shown.psnr:.1f} dB: {shown.original.caption}", _triple(shown))
        for group in GROUPS
        for shown in judgement.shown[group][:GRID_ROWS]
    ]
    return captioned_rows(
        rows, headings=["caption", "original", "reconstruction", f"{MAGNIFIED} x difference"]
    )


def _triple(shown: Shown) -> list[np.ndarray]:
    """The original, what was made of it, and how they differ."""
    original = shown.original.pixels
    difference = np.abs(original.astype(int) - shown.made.astype(int)) * MAGNIFIED
    return [original, shown.made, difference.clip(0, 255).astype(np.uint8)]


def _table_row(row: Explained, judgement: Judgement, training_beta: float) -> dict[str, str]:
    """A figure that was not measured has an empty value and is left out of the page."""
    value, error = judgement.figures.get(row.key), judgement.standard_errors.get(row.key)
    return {
        "name": row.name.format(training_beta=training_beta),
        "unit": row.unit,
        "better": row.better,
        "says": row.says,
        "value": "" if value is None else f"{value:,.{row.digits}f}",
        "error": "" if error is None else f"± {error:,.{row.digits}f}",
    }


def _tile(shown: Shown) -> dict[str, Any]:
    box = (LARGEST_SIDE, LARGEST_SIDE)
    return {
        "caption": short(shown.original.caption),
        "key": shown.original.key,
        "psnr": f"{shown.psnr:.2f}",
        "ssim": f"{shown.ssim:.3f}",
        "sharp": shown.made.shape[0] < SMALLEST_SHARP_SIDE,
        "images": [inline_picture(picture, box, QUALITY) for picture in _triple(shown)],
    }


def _rank_frequency(code_counts: Sequence[int]) -> dict[str, Any]:
    """The codes' frequencies in falling order, on logarithmic axes, and what to compare them to."""
    counts = np.sort(np.array(code_counts))[::-1]
    share = counts[counts > 0] / counts.sum()
    lowest = math.floor(math.log10(min(share[-1], 1 / len(counts))))
    decades = math.log10(len(counts))

    def x(rank: float) -> float:
        return round(LEFT + (CHART_WIDTH - LEFT - RIGHT) * math.log10(rank) / decades, 1)

    def y(frequency: float) -> float:
        height = CHART_HEIGHT - TOP - BOTTOM
        return round(TOP + height * math.log10(frequency) / lowest, 1)

    ranks = np.unique(np.geomspace(1, len(share), CURVE_POINTS).round().astype(int))
    most = max(1, len(counts) // 10)
    return {
        "frame": (LEFT, CHART_WIDTH - RIGHT, TOP, CHART_HEIGHT - BOTTOM),
        "curve": " ".join(f"{x(rank)},{y(share[rank - 1])}" for rank in ranks),
        "last": (x(len(share)), y(share[-1])),
        "uniform": y(1 / len(counts)),
        "x_ticks": [(x(10**power), f"{10**power:,}") for power in range(int(decades) + 1)],
        "y_ticks": [(y(10.0**-power), _share(power)) for power in range(-lowest + 1)],
        "most": most,
        "most_share": f"{100 * counts[:most].sum() / counts.sum():.1f}",
    }


def _share(power: int) -> str:
    """10 to the minus `power`, as a percentage that is short."""
    return f"{10.0 ** (2 - power):g} %" if power < 6 else f"1e{2 - power} %"
