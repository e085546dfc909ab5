"""The prior on one GPU: fp16 with per-resblock scaling beside bf16, and real updates of the 12B.

Not part of `make bench`, which compares on a CPU. On a machine with one H200 (no Ray is needed):

    python -m tests.benchmarks.prior_gpu --tokens TOKENS --tokenizer TOKENIZER > prior_gpu.json

Without token shards it trains on random tokens: speed and memory are the same, the curves say
nothing. Never run so far: there are no measured figures yet.

The limit that the shares refer to is arithmetic: 6 FLOP a parameter of the resblocks' matrices and
token, at the card's datasheet rate for dense 16-bit products (an H100 or H200: 989 TFLOP/s).
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from PIL import Image
from torch import Tensor

from models.averaging import AveragingConfig
from models.prior import START_ID, PriorConfig
from pipelines.data.stage import Manifest
from pipelines.data.tokenizer import CaptionTokenizer
from pipelines.training.prior_trainer import PriorTrainer
from pipelines.training.prior_training import (
    Precision,
    PriorOptimizerConfig,
    PriorTraining,
    Recompute,
)
from pipelines.training.scale_picture import scale_picture
from pipelines.training.token_loader import TokenBatch, TokenLoader

Part = Literal["fp16-beside-bf16", "12b"]
WARM_UP = 3  # updates that compile kernels, and are not timed
RECORD_EVERY = 5


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is run."""

    parts: tuple[Part, ...] = ("fp16-beside-bf16", "12b")
    smaller: PriorConfig = field(
        default_factory=lambda: PriorConfig(n_layers=32, n_heads=24, d_model=1536)
    )
    """The 1b preset."""
    smaller_updates: int = 500
    smaller_batch: int = 16
    larger: PriorConfig = field(default_factory=PriorConfig)
    larger_updates: int = 20
    larger_batch: int = 6
    recompute: Recompute = "selective"
    """Of the 12B; the smaller model keeps its activations."""
    tokens: Path = Path()
    tokenizer: Path = Path()
    pictures: Path = Path("runs/bench/gpu")
    """Directory for the pictures of the resblocks."""
    device: str = "cuda"


def main(bench: Bench) -> None:
    device = torch.device(bench.device)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(json.dumps({"device": card, "torch": torch.__version__} | measured(bench, device)))


def measured(bench: Bench, device: torch.device) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    if "fp16-beside-bf16" in bench.parts:
        precisions: tuple[Precision, ...] = ("fp16", "bf16")
        for precision in precisions:
            how = smaller_training(bench, precision)
            rows[f"smaller-{precision}"] = train(bench, bench.smaller, how, device, precision)
    if "12b" in bench.parts:
        rows["12b"] = train(bench, bench.larger, larger_training(bench), device, "12b")
    return rows


def smaller_training(bench: Bench, precision: Precision) -> PriorTraining:
    """Scaling is on in fp16 only, as by default; all else is equal."""
    warmup = min(100, bench.smaller_updates // 2)
    return PriorTraining(
        steps=bench.smaller_updates,
        batch_samples=bench.smaller_batch,
        precision=precision,
        recompute="none",
        optimizer=PriorOptimizerConfig(warmup_steps=warmup, decay="cosine", moments="fp32"),
    )


def larger_training(bench: Bench) -> PriorTraining:
    """8 bytes a parameter: split weights and 16-bit moments, gradients one resblock at a time."""
    return PriorTraining(
        steps=bench.larger_updates,
        batch_samples=bench.larger_batch,
        precision="bf16",
        recompute=bench.recompute,
        optimizer=PriorOptimizerConfig(
            peak_lr=1e-5,
            warmup_steps=bench.larger_updates,
            moments="paper",
            master="split",
            step="in_backward",
            clip_norm=0.0,
        ),
        averaging=AveragingConfig(keep_on="host"),
    )


def train(
    bench: Bench, model: PriorConfig, how: PriorTraining, device: torch.device, name: str
) -> dict[str, Any]:
    """All updates of one training: its curve, rate and memory."""
    batches = batches_of(bench, model, how)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer = PriorTrainer(model, how, device)
    losses, seconds, records = [], [], []
    for step in range(how.steps):
        started = time.perf_counter()
        metrics = trainer.update(batches(step))  # ends with the only wait for the device
        seconds.append(time.perf_counter() - started)
        losses.append(round(metrics["loss"], 4))
        if trainer.step % RECORD_EVERY == 0 or trainer.step == how.steps:
            records.append(trainer.block_record())
            print(f"{name}: update {trainer.step}, loss {losses[-1]}", file=sys.stderr, flush=True)
    bench.pictures.mkdir(parents=True, exist_ok=True)
    picture = scale_picture(records, f"{name}, {how.precision}")
    Image.fromarray(picture).save(bench.pictures / f"resblocks-{name}.png")
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    row = {
        "parameters": sum(parameter.numel() for parameter in trainer.prior.parameters()),
        "batch": how.batch_samples,
        "updates": how.steps,
        "skipped_updates": metrics["skipped_updates"],
        "losses": losses,
        "gib": memory_of(trainer)
        | {"peak": gib(peak), "rest_of_peak": gib(peak - bytes_on(trainer, device))},
    }
    return row | rate(model, how, seconds)


def rate(model: PriorConfig, how: PriorTraining, seconds: list[float]) -> dict[str, float]:
    """Pictures a second, and the share of the card's products a second, recomputation left out."""
    timed = statistics.median(seconds[min(WARM_UP, len(seconds) - 1) :])
    matrices = 12 * model.n_layers * model.d_model**2
    flops = 6 * matrices * model.stream_len * how.batch_samples
    return {
        "seconds_per_update": round(timed, 4),
        "images_per_second": round(how.batch_samples / timed, 3),
        "share_of_989_tflops": round(flops / timed / 989e12, 4),
    }


def tensors_by_kind(trainer: PriorTrainer) -> dict[str, list[Tensor]]:
    kinds: dict[str, list[Tensor]] = {"weights": list(trainer.prior.parameters())}
    for kept in trainer.optimizer.state.values():
        for key, tensor in kept.items():
            kinds.setdefault(key, []).append(tensor)
    return kinds | {"average": list(trainer.average.shadow.values())}


def memory_of(trainer: PriorTrainer) -> dict[str, float]:
    return {
        f"{kind} ({tensors[0].device.type})": gib(sum(map(size, tensors)))
        for kind, tensors in tensors_by_kind(trainer).items()
    }


def bytes_on(trainer: PriorTrainer, device: torch.device) -> int:
    kinds = tensors_by_kind(trainer).values()
    return sum(size(t) for tensors in kinds for t in tensors if t.device.type == device.type)


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def gib(number: float) -> float:
    return round(number / 2**30, 3)


def batches_of(bench: Bench, model: PriorConfig, how: PriorTraining) -> Callable[[int], TokenBatch]:
    if bench.tokens != Path():
        loader = TokenLoader(
            Manifest.load(bench.tokens, stage="encode_pairs"),
            CaptionTokenizer.from_file(bench.tokenizer),
            text_len=model.text_len,
            batch_samples=how.batch_samples,
            bpe_dropout=how.bpe_dropout,
            seed=how.seed,
        )
        return loader.batch

    def random_batch(step: int) -> TokenBatch:
        generator = torch.Generator().manual_seed(step)
        count = how.batch_samples
        text = torch.randint(2, model.text_vocab_size, (count, model.text_len), generator=generator)
        text[:, 0] = START_ID
        codes = (count, model.image_len)
        return TokenBatch(
            text, torch.randint(0, model.image_vocab_size, codes, generator=generator)
        )

    return random_batch


if __name__ == "__main__":
    main(tyro.cli(Bench))
