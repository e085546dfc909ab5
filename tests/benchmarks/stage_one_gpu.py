"""Stage one at the paper's sizes on one GPU: pictures a second, encoding and training.

Not part of `make bench`, which compares on a CPU. On a machine with a GPU (no Ray is needed):

    python -m tests.benchmarks.stage_one_gpu > stage_one_gpu.json

The limits that the shares refer to are arithmetic: the model's FLOPs at the card's datasheet rate,
for dense half precision (an H100 or H200: 989 TFLOP/s).
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from models.dvae import DVAE, DVAEConfig
from models.fast_encoder import FastEncoder, Precision
from models.stage_one import Encoder
from pipelines.training.stage_one_trainer import StageOneTrainer
from pipelines.training.stage_one_training import DVAETraining


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is run."""

    dvae: DVAEConfig = field(default_factory=DVAEConfig)
    precision: Precision = "fp16"
    encode_batch: int = 128
    train_batch: int = 16
    repeats: int = 10
    device: str = "cuda"
    flops_per_second: float = 989e12
    """The card's rate in half precision."""


def main(bench: Bench) -> None:
    device = torch.device(bench.device)
    rows = {"encode": encode(bench, device), "train": train(bench, device)}
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    about = {"device": card, "torch": torch.__version__, "precision": bench.precision}
    print(json.dumps(about | rows, indent=1))


def encode(bench: Bench, device: torch.device) -> dict[str, Any]:
    """uint8 pictures on the device to codes on the device, through the fast encoder."""
    torch.manual_seed(0)
    model = DVAE(bench.dvae).to(device).eval()
    side = bench.dvae.image_size
    squares = torch.randint(256, (bench.encode_batch, side, side, 3), dtype=torch.uint8).to(device)
    pixels = squares.permute(0, 3, 1, 2)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        plain = model.encode(pixels[:1].float() / 255)
    assert isinstance(model.encoder, Encoder)
    model.encoder = FastEncoder(model.encoder, bench.precision)

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return model.encode(pixels.float().div_(255))

    agreement = (run()[:1] == plain).float().mean()
    row = measure(run, bench, device, bench.encode_batch, counter.get_total_flops())
    return row | {"equal_codes": round(float(agreement), 4)}


def train(bench: Bench, device: torch.device) -> dict[str, Any]:
    """Whole updates: augmented pictures in pinned memory to new weights."""
    how = replace(DVAETraining(), steps=1_000_000, batch_samples=bench.train_batch)
    trainer = StageOneTrainer(
        bench.dvae, replace(how, precision=bench.precision), device=device, rank=0, world_size=1
    )
    side = bench.dvae.image_size
    squares = torch.randint(256, (bench.train_batch, side, side, 3), dtype=torch.uint8)
    batch = squares.permute(0, 3, 1, 2)
    with FlopCounterMode(display=False) as counter:
        trainer.update(batch[:1], report=False)

    def run() -> None:
        trainer.update(batch, report=False)

    return measure(run, bench, device, bench.train_batch, counter.get_total_flops())


def measure(
    run: Callable[[], object], bench: Bench, device: torch.device, pictures: int, flops: int
) -> dict[str, Any]:
    """Medians of wall seconds, each run waited for; `flops` are one picture's."""
    seconds = []
    for _ in range(bench.repeats + 2):  # two to warm up
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    rate = pictures / statistics.median(seconds[2:])
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return {
        "batch": pictures,
        "images_per_second": round(rate, 2),
        "gflop_per_image": round(flops / 1e9, 1),
        "share_of_limit": round(rate * flops / bench.flops_per_second, 4),
        "gib": round(memory, 2),
    }


if __name__ == "__main__":
    main(tyro.cli(Bench))
