"""One update of a stage-one model, and everything that a resumed training must find again."""

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from models.averaging import IterateAverage
from models.code_usage import code_counts, codes_used, perplexity
from models.loss_scale import LossScale
from models.objective import Loss
from models.stage_one import StageOneConfig
from pipelines.training import checkpoint
from pipelines.training.optimizer import adam_moments
from pipelines.training.stage_one_training import StageOneTraining
from pipelines.training.weights import build_stage_one

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
COLLAPSED_SHARE = 0.01  # of the codes: fewer in use after the warm-up is a collapse


class StageOneTrainer:
    """Model, optimizer, averages and the count of updates of one rank."""

    def __init__(
        self,
        config: StageOneConfig,
        training: StageOneTraining,
        *,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.training, self.device, self.rank, self.world_size = training, device, rank, world_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)  # every rank begins with the same weights
            model = build_stage_one(config)
        # Channels last: 1.4 times as fast on CPU.
        self.model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore
        self.objective = training.objective(self.model)
        self.parameters = dict(self.model.named_parameters())
        self.trained = {k: value for k, value in self.parameters.items() if value.requires_grad}
        self.optimizer = self._build_optimizer()
        self.average = IterateAverage(self.parameters.items(), training.averaging)
        self.loss_scale = LossScale(training.precision)
        self.gradients = self._flat_gradients()
        self.counts = torch.zeros(config.vocab_size, dtype=torch.int64, device=device)
        self.usage = torch.zeros_like(self.counts)
        """Uses of each code over all ranks since `take_usage`; `metrics` adds to it."""
        self.step, self.skipped, self.skipped_in_a_row = 0, 0, 0

    def update(self, batch: Tensor, *, report: bool) -> Loss:
        """One update on this rank's pictures (B, 3, S, S) uint8; skipped on all if not finite."""
        self.gradients.zero_()
        noise = self._noise()
        with self._autocast():
            loss = self.objective.loss(
                self._pixels(batch), step=self.step, generator=noise, report=report
            )
        (loss.value * (self.loss_scale.value / self.world_size)).backward()
        # The last element counts the ranks whose loss is not finite, for one reduction less.
        self.gradients[-1] = (~torch.isfinite(loss.value.detach())).float()
        self._sum_over_ranks(self.gradients)
        norm = (gradients := self.gradients[:-1].div_(self.loss_scale.value)).norm()
        finite = math.isfinite(float(norm)) and not self.gradients[-1]
        if finite:
            if self.training.clip_norm:
                gradients.mul_((self.training.clip_norm / (norm + 1e-6)).clamp(max=1.0))
            for group in self.optimizer.param_groups:
                group["lr"] = self.training.step_sizes.lr(self.step)
            self.optimizer.step()
            self.objective.after_update(
                generator=noise, sum_over_ranks=self._sum_over_ranks, is_first=self.rank == 0
            )
        self._count(finite)
        self.step += 1
        self.average.update(self.parameters.items(), self.step)
        self.counts += code_counts(loss.tokens, len(self.counts))
        return loss

    def metrics(self, loss: Loss, sums: dict[str, float]) -> dict[str, float]:
        """Of the update just made, means over all ranks; `sums` of theirs; codes since last time.

        Every rank must call it.
        """
        local = [*loss.terms.values(), *(loss.value.new_tensor(value) for value in sums.values())]
        values = torch.stack([value.detach().double() for value in local])
        self._sum_over_ranks(values)
        self._sum_over_ranks(self.counts)
        totals = dict(zip([*loss.terms, *sums], values.tolist(), strict=True))
        row = {name: totals[name] / self.world_size for name in loss.terms}
        row |= {name: totals[name] for name in sums}
        share = codes_used(self.counts) / len(self.counts)
        row |= {
            "codes_used": codes_used(self.counts),
            "codes_used_share": share,
            "perplexity": perplexity(self.counts),
            "codebook_collapsed": float(
                share < COLLAPSED_SHARE and self.step > self.objective.warmup_steps
            ),
            "skipped": self.skipped,
            "loss_scale": self.loss_scale.value,
            "lr": self.training.step_sizes.lr(self.step - 1),
        }
        self.usage += self.counts
        self.counts.zero_()
        return row | self.objective.settings(self.step - 1)

    def take_usage(self) -> np.ndarray:
        """Uses of each code, (K,), since the last call."""
        usage = self.usage.cpu().numpy().copy()
        self.usage.zero_()
        return usage

    def preview(self, batch: Tensor) -> dict[str, np.ndarray]:
        """(B, S, S, 3) uint8 pictures through the averaged weights, by name."""
        model = build_stage_one(self.model.config).to(self.device)
        model.load_state_dict(self.average.state_dict())
        with self._autocast():
            rows = self.objective.preview(
                model, self._pixels(batch), step=self.step, generator=self._noise()
            )
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
        for name, parameter in self.trained.items():
            self.optimizer.state[parameter].update(state["moments"][name])
        self.step, self.skipped = progress["step"], progress["skipped"]
        self.skipped_in_a_row = progress["skipped_in_a_row"]
        self.loss_scale.value, self.loss_scale.finite_steps = progress["loss_scale"]
        return [*said, f"resumed after step {self.step} from {path.name}"]

    def _state(self) -> dict[str, Any]:
        return {
            "model": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "moments": adam_moments(self.optimizer, self.trained.items()),
            "average": self.average.state_dict(),
            "objective": self.objective.state(),
        }

    def _count(self, finite: bool) -> None:
        # An overflow of scaled gradients is how fp16 finds its scale, not a fault.
        is_fault = bool(self.gradients[-1]) or self.loss_scale.value <= 1
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + is_fault
        self.skipped += not finite
        self.loss_scale.update(finite)

    def _build_optimizer(self) -> torch.optim.AdamW:
        weights = [value for name, value in self.trained.items() if name.endswith(".w")]
        others = [value for name, value in self.trained.items() if not name.endswith(".w")]
        groups = [
            {"params": weights, "weight_decay": self.training.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, betas=self.training.betas, eps=1e-8, fused=True)

    def _flat_gradients(self) -> Tensor:
        """One vector that all gradients are views of, and one element more.

        The buckets of DistributedDataParallel are laid out anew after the first update: a resumed
        run would sum in another order.
        """
        sizes = [parameter.numel() for parameter in self.trained.values()]
        flat = torch.zeros(sum(sizes) + 1, device=self.device)
        for parameter, part in zip(self.trained.values(), flat[:-1].split(sizes), strict=True):
            # Laid out as the parameter is: the fused optimizer walks both in memory order.
            parameter.grad = part.as_strided(parameter.shape, parameter.stride())
        return flat

    def _sum_over_ranks(self, values: Tensor) -> None:
        if self.world_size > 1:
            dist.all_reduce(values)

    def _autocast(self) -> AbstractContextManager[Any]:
        precision = self.training.precision
        is_used = precision in DTYPES
        return torch.autocast(self.device.type, DTYPES.get(precision), enabled=is_used)

    def _pixels(self, batch: Tensor) -> Tensor:
        if self.device.type == "cuda":
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        return batch.to(self.device).float().div_(255)

    def _noise(self) -> torch.Generator:
        """Noise of the next update on this rank: a function of both, so that resuming keeps it."""
        words = np.random.SeedSequence([self.training.seed, self.step, self.rank])
        seed = int(words.generate_state(1, np.uint64)[0])
        return torch.Generator(self.device).manual_seed(seed)
