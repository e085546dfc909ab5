"""Pictures to the features of their codes: `FastEncoder` against the released code."""

import numpy as np
import torch
from torch import Tensor

from models.dvae import DVAE, DVAEConfig
from models.fast_encoder import FastEncoder, Precision
from models.likelihood import map_pixels
from tests.benchmarks.measure import Effort, Row, compare_speed, peer_package
from tests.benchmarks.pictures import photo

PAPER = DVAEConfig()
SMALL = DVAEConfig(image_size=64, vocab_size=512, n_hid=64)  # the least that the peer accepts
PICTURES = 2
MOST_REPEATS = 3  # each takes the peer 15 to 30 seconds at the paper's size
LARGEST_ERROR: dict[Precision, float] = {"fp32": 1e-5, "bf16": 0.02}  # of the features' norm


def rows(effort: Effort) -> list[Row]:
    """The paper's model; with less than the usual effort, a small one. All weights are random.

    Random weights make many codes nearly as likely as the first, so that rounding changes more of
    them than it would of a trained model.
    """
    config = PAPER if effort.rows >= Effort().rows else SMALL
    torch.manual_seed(0)
    encoder = DVAE(config).encoder
    package = peer_package("dall_e", "DALL-E 0.1")
    theirs = package.Encoder(n_hid=config.n_hid, vocab_size=config.vocab_size)
    theirs.load_state_dict(encoder.state_dict())
    pixels = photos(config.image_size)
    with torch.inference_mode():
        features = theirs(pixels)
        return [
            compare(precision, FastEncoder(encoder, precision), theirs, pixels, features, effort)
            for precision in LARGEST_ERROR
        ]


def compare(
    precision: Precision,
    ours: torch.nn.Module,
    theirs: torch.nn.Module,
    pixels: Tensor,
    features: Tensor,
    effort: Effort,
) -> Row:
    made = ours(pixels)
    assert float((made - features).norm() / features.norm()) <= LARGEST_ERROR[precision]
    equal = float((made.argmax(dim=1) == features.argmax(dim=1)).float().mean())
    return compare_speed(
        f"encoder-{precision}",
        peer="DALL-E 0.1 (PyPI)",
        precision=precision if precision == "fp32" else f"{precision}, theirs fp32",
        work=len(pixels),
        what="pictures",
        ours=lambda: ours(pixels),
        theirs=lambda: theirs(pixels),
        repeats=min(effort.repeats, MOST_REPEATS),
        packages=("torch", "DALL-E"),
        note=f"{equal:.2%} of codes equal; random weights, {pixels.shape[-1]} px, "
        f"{features.shape[1]} codes",
    )


def photos(side: int) -> Tensor:
    rng = np.random.default_rng(0)
    stack = np.stack([photo(side, side, rng) for _ in range(PICTURES)])
    return map_pixels(torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 255)
