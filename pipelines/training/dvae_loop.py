"""The training loop of the dVAE: knows neither Ray nor MLflow, runs on one process or many."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from models.averaging import AveragingConfig, IterateAverage
from models.dvae import DVAE, DVAEConfig
from models.dvae_objective import (
    ELB,
    DVAESchedule,
    LossScale,
    code_counts,
    codes_used,
    hard_elb,
    perplexity,
    reconstructions,
    relaxed_elb,
)
from pipelines.data.crops import CropConfig
from pipelines.training import checkpoint
from pipelines.training.optimizer import adam_moments
from pipelines.training.picture_loader import PictureLoader, prefetch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SKIPS_IN_A_ROW = 10
PREVIEW_PICTURES = 16


@dataclass(frozen=True, kw_only=True)
class DVAETraining:
    """How the dVAE is trained. The defaults are the paper's (appendix A.2)."""

    steps: int = 3_000_000
    """Updates."""
    batch_samples: int = 512
    """Pictures an update, over all workers."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp16"
    """Of the convolutions, but for the two at the codes; fp16 scales the loss as a whole."""
    schedule: DVAESchedule = field(default_factory=DVAESchedule)
    crops: CropConfig = field(default_factory=CropConfig)
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's; its epsilon is the paper's 1e-8
    weight_decay: float = 1e-4
    """On the convolutions' weights, not on their biases (the paper does not say)."""
    clip_norm: float = 0.0
    """Global norm that gradients are scaled down to; 0, as in the paper, clips none."""
    averaging: AveragingConfig = field(
        default_factory=lambda: AveragingConfig(decay=0.999, every=1)
    )
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_samples < 1 or not self.clip_norm >= 0:
            raise ValueError(
                "steps and batch_samples must be at least 1 and clip_norm at least 0, "
                f"got {self.steps}, {self.batch_samples}, {self.clip_norm}"
            )


@dataclass(frozen=True, kw_only=True)
class DVAECadence:
    """How often things are written, in updates; changing it does not change the result."""

    log_every: int = 100
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    images_every: int = 5000


class DVAETrainer:
    """Everything that a resumed training must find again as it was."""

    def __init__(
        self,
        config: DVAEConfig,
        training: DVAETraining,
        *,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.training, self.device, self.rank, self.world_size = training, device, rank, world_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)  # every rank begins with the same weights
            model = DVAE(config)
        # Channels last: 1.4 times as fast on CPU.
        self.model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = self._build_optimizer()
        self.average = IterateAverage(self.parameters.items(), training.averaging)
        self.loss_scale = LossScale(training.precision)
        self.gradients = self._flat_gradients()
        self.counts = torch.zeros(config.vocab_size, dtype=torch.int64, device=device)
        self.step, self.skipped, self.skipped_in_a_row = 0, 0, 0

    def update(self, batch: Tensor) -> ELB:
        """One update on this rank's pictures (B, 3, S, S) uint8; skipped on all if not finite."""
        training, schedule = self.training, self.training.schedule
        self.gradients.zero_()
        tau, beta = schedule.tau(self.step), schedule.beta(self.step)
        pixels = self._pixels(batch)
        with self._autocast():
            elb = relaxed_elb(self.model, pixels, tau=tau, beta=beta, generator=self._noise())
        (-elb.value * (self.loss_scale.value / self.world_size)).backward()
        # The last element counts the ranks whose loss is not finite, for one reduction less.
        self.gradients[-1] = (~torch.isfinite(elb.value.detach())).float()
        if self.world_size > 1:
            dist.all_reduce(self.gradients)
        norm = (gradients := self.gradients[:-1].div_(self.loss_scale.value)).norm()
        finite = math.isfinite(float(norm))
        if finite:
            if training.clip_norm:
                gradients.mul_((training.clip_norm / (norm + 1e-6)).clamp(max=1.0))
            for group in self.optimizer.param_groups:
                group["lr"] = schedule.lr(self.step)
            self.optimizer.step()
        self._count(finite)
        self.step += 1
        self.average.update(self.parameters.items(), self.step)
        self.counts += code_counts(elb.tokens, len(self.counts))
        return elb

    @torch.no_grad()
    def hard(self, batch: Tensor) -> ELB:
        """The bound without relaxation, under the noise of the next update."""
        beta = self.training.schedule.beta(self.step)
        with self._autocast():
            return hard_elb(self.model, self._pixels(batch), beta=beta, generator=self._noise())

    def metrics(self, relaxed: ELB, hard: ELB) -> dict[str, float]:
        """Means over all ranks of the update just made, and the codes used since the last call."""
        parts = [relaxed.value, hard.value, relaxed.reconstruction, relaxed.kl]
        values = torch.stack(parts).detach()
        if self.world_size > 1:
            dist.all_reduce(values)
            dist.all_reduce(self.counts)
        bound, hard_bound, reconstruction, kl = (values / self.world_size).tolist()
        row = {
            "relaxed_elb": bound,
            "hard_elb": hard_bound,
            "gap": bound - hard_bound,
            "reconstruction": reconstruction,
            "kl": kl,
            "codes_used": codes_used(self.counts),
            "perplexity": perplexity(self.counts),
            "skipped": self.skipped,
        }
        self.counts.zero_()
        return row | self.training.schedule.at(self.step - 1)

    def preview(self, batch: Tensor) -> dict[str, np.ndarray]:
        """(B, S, S, 3) uint8 pictures through the averaged weights: see `reconstructions`."""
        model = DVAE(self.model.config).to(self.device)
        model.load_state_dict(self.average.state_dict())
        tau = self.training.schedule.tau(self.step)
        rows = reconstructions(model, self._pixels(batch), tau, self._noise())
        return {
            name: pixels.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            for name, pixels in rows.items()
        }

    def save(self, root: Path, keep: int) -> None:
        """A checkpoint after the current step; every rank must call it."""
        progress = {
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "loss_scale": [self.loss_scale.value, self.loss_scale.finite_steps],
        }
        checkpoint.save(root, self.step, self._state(), progress, keep)

    def resume(self, root: Path) -> list[str]:
        """Go on from the newest valid checkpoint, if there is one; what is to be said about it."""
        path, rejected = checkpoint.newest_valid(root)
        said = [f"checkpoint refused: {reason}" for reason in rejected]
        if path is None:
            return said
        state = self._state()
        progress = checkpoint.load(path, state)
        for name, parameter in self.parameters.items():
            self.optimizer.state[parameter].update(state["moments"][name])
        self.step, self.skipped = progress["step"], progress["skipped"]
        self.skipped_in_a_row = progress["skipped_in_a_row"]
        self.loss_scale.value, self.loss_scale.finite_steps = progress["loss_scale"]
        return [*said, f"resumed after step {self.step} from {path.name}"]

    def _state(self) -> dict[str, Any]:
        return {
            "model": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "moments": adam_moments(self.optimizer, self.parameters.items()),
            "average": self.average.state_dict(),
        }

    def _count(self, finite: bool) -> None:
        # An overflow of scaled gradients is how fp16 finds its scale, not a fault.
        is_fault = bool(self.gradients[-1]) or self.loss_scale.value <= 1
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + is_fault
        self.skipped += not finite
        self.loss_scale.update(finite)

    def _build_optimizer(self) -> torch.optim.AdamW:
        biases = [value for name, value in self.parameters.items() if name.endswith(".b")]
        weights = [value for name, value in self.parameters.items() if name.endswith(".w")]
        groups = [
            {"params": weights, "weight_decay": self.training.weight_decay},
            {"params": biases, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, betas=self.training.betas, eps=1e-8, fused=True)

    def _flat_gradients(self) -> Tensor:
        """One vector that all gradients are views of, and one element more.

        The buckets of DistributedDataParallel are laid out anew after the first update: a resumed
        run would sum in another order.
        """
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        flat = torch.zeros(sum(sizes) + 1, device=self.device)
        for parameter, part in zip(self.parameters.values(), flat[:-1].split(sizes), strict=True):
            # Laid out as the parameter is: the fused optimizer walks both in memory order.
            parameter.grad = part.as_strided(parameter.shape, parameter.stride())
        return flat

    def _autocast(self) -> AbstractContextManager[Any]:
        precision = self.training.precision
        is_used = precision in DTYPES
        return torch.autocast(self.device.type, DTYPES.get(precision), enabled=is_used)

    def _pixels(self, batch: Tensor) -> Tensor:
        return batch.to(self.device, non_blocking=True).float().div_(255)

    def _noise(self) -> torch.Generator:
        """Noise of the next update on this rank: a function of both, so that resuming keeps it."""
        words = np.random.SeedSequence([self.training.seed, self.step, self.rank])
        seed = int(words.generate_state(1, np.uint64)[0])
        return torch.Generator(self.device).manual_seed(seed)


def train_dvae(
    config: DVAEConfig,
    training: DVAETraining,
    *,
    cadence: DVAECadence,
    loader: PictureLoader,
    device: torch.device,
    rank: int,
    world_size: int,
    checkpoints: Path,
    on_log: Callable[[int, dict[str, float]], None],
    on_resume: Callable[[int, list[str]], None],
    on_images: Callable[[int, dict[str, np.ndarray]], None],
) -> dict[str, Tensor]:
    """Train to the last step; gives the averaged weights, equal on every rank.

    Every rank calls `on_log` and `on_resume` (the caller acts on rank 0), rank 0 alone `on_images`.
    """
    trainer = DVAETrainer(config, training, device=device, rank=rank, world_size=world_size)
    said = trainer.resume(checkpoints)
    on_resume(trainer.step, said)
    clock, waited = time.monotonic(), 0.0
    with prefetch(loader.batch, trainer.step, training.steps) as read:
        while trainer.step < training.steps:
            waited -= time.monotonic()
            batch = read(trainer.step)
            waited += time.monotonic()
            due = _due(trainer.step + 1, training.steps)
            hard = trainer.hard(batch) if due(cadence.log_every) else None
            relaxed = trainer.update(batch)
            if trainer.skipped_in_a_row == SKIPS_IN_A_ROW:
                keys = ", ".join(loader.keys(trainer.step - 1))
                raise RuntimeError(
                    f"{SKIPS_IN_A_ROW} updates in a row up to {trainer.step} had no finite loss or "
                    f"gradient; the last one's pictures on worker {rank} were {keys}"
                )
            if hard is not None:
                elapsed = time.monotonic() - clock
                pictures = ((trainer.step - 1) % cadence.log_every + 1) * training.batch_samples
                rates = {"images_per_second": pictures / elapsed, "data_wait": waited / elapsed}
                on_log(trainer.step, trainer.metrics(relaxed, hard) | rates)
                clock, waited = time.monotonic(), 0.0
            if due(cadence.checkpoint_every):
                trainer.save(checkpoints, cadence.keep_checkpoints)
            if due(cadence.images_every) and rank == 0:
                on_images(trainer.step, trainer.preview(loader.batch(0)[:PREVIEW_PICTURES]))
    return trainer.average.state_dict()


def _due(step: int, last: int) -> Callable[[int], bool]:
    return lambda every: step % every == 0 or step == last
