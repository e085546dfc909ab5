"""The tiny preset learns with state of 16 bits as it does in fp32."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from jobs.configs.train_prior import TINY
from pipelines.training.prior_trainer import PriorTrainer
from pipelines.training.prior_training import Precision, PriorOptimizerConfig
from pipelines.training.token_loader import TokenBatch

MODEL = TINY.prior
UPDATES = 16
SAMPLES = 4


def batch(step: int) -> TokenBatch:
    """One of four batches, whose image tokens follow from the captions."""
    generator = torch.Generator().manual_seed(step % 4)
    shape = (SAMPLES, MODEL.text_len)
    text = torch.randint(2, MODEL.text_vocab_size, shape, generator=generator)
    text[:, 0], text[:, 9:] = 1, 0
    image = text[:, 1:9].repeat_interleave(MODEL.grid, dim=1) + torch.arange(MODEL.image_len) % 3
    return TokenBatch(text, image % MODEL.image_vocab_size)


def curve(precision: Precision, **overrides: Any) -> list[float]:
    optimizer = PriorOptimizerConfig(
        warmup_steps=10, decay="cosine", **({"clip_norm": 1.0, "peak_lr": 5e-3} | overrides)
    )
    how = replace(
        TINY.training,
        steps=UPDATES,
        batch_samples=SAMPLES,
        precision=precision,
        resblock_scaling="never",  # in bf16, unscaling would round once more
        optimizer=optimizer,
    )
    trainer = PriorTrainer(MODEL, how, torch.device("cpu"))
    return [trainer.update(batch(step))["loss"] for step in range(UPDATES)]


@pytest.fixture(scope="module")
def reference() -> list[float]:
    """fp32 moments."""
    made = curve("fp32", moments="fp32")
    assert made[-1] < 0.75 * made[0]
    return made


@pytest.mark.parametrize(("moments", "largest"), [("paper", 0.001), ("bf16", 0.01)])
def test_no_loss_of_the_curve_is_further_from_that_of_fp32_moments_than_stated(
    reference: list[float], moments: str, largest: float
) -> None:
    pairs = zip(curve("fp32", moments=moments), reference, strict=True)
    assert max(abs(loss / wanted - 1) for loss, wanted in pairs) < largest


@pytest.fixture(scope="module")
def fp32_weights() -> list[float]:
    return curve("bf16", moments="bf16", peak_lr=1e-3)


@pytest.mark.parametrize("moments", ["bf16", "paper"])
def test_split_weights_learn_as_fp32_weights_do(fp32_weights: list[float], moments: str) -> None:
    """Both give the branches the nearest bf16 weights, and get gradients of bf16.

    What differs is the weight half way between two bf16 numbers, one in 65,536, which torch rounds
    to even and `split` away from zero: with a step size at which that does not grow.
    """
    halves = curve("bf16", moments=moments, master="split", peak_lr=1e-3)
    pairs = zip(halves, fp32_weights, strict=True)
    assert max(abs(loss / wanted - 1) for loss, wanted in pairs) < 0.001
    assert halves[-1] < 0.9 * halves[0]
