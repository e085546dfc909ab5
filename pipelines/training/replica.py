"""A model of which every rank has the whole: one update of it, and what a resumed run must find.

Gradients are summed over the ranks in one vector; an update that is not finite anywhere is skipped
everywhere, and all stop after the update in which any is asked to.
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.averaging import AveragingConfig, IterateAverage
from models.loss_scale import LossScale
from pipelines.training.checkpoint import Checkpoints
from pipelines.training.optimizer import adam_moments

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Replica:
    """A rank's copy of a model, its optimizer, average and the count of updates."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        averaging: AveragingConfig,
        *,
        precision: str,
        clip_norm: float,
        world_size: int,
    ) -> None:
        """`optimizer` has the model's parameters with a gradient; a `clip_norm` of 0 clips none."""
        self.optimizer, self.clip_norm, self.world_size = optimizer, clip_norm, world_size
        self.precision = precision
        self.parameters = dict(model.named_parameters())
        self.trained = {k: value for k, value in self.parameters.items() if value.requires_grad}
        self.average = IterateAverage(self.parameters.items(), averaging)
        self.loss_scale = LossScale(precision)
        self.gradients = self._flat_gradients()
        self.step, self.skipped, self.skipped_in_a_row = 0, 0, 0
        self.stop_asked = False
        """Whether any rank was asked to stop; the same on all."""

    def descend(self, loss: Tensor, lr: float, *, stop: bool) -> bool:
        """Move the weights against the gradient of the ranks' mean loss, unless it is not finite.

        Gives whether they moved; `count` must follow, after whatever else moves with an update.
        `stop` asks all ranks to stop, which `stop_asked` then says.
        """
        self.gradients.zero_()
        (loss * (self.loss_scale.value / self.world_size)).backward()
        # Two elements more, for two reductions less.
        is_fault = (~torch.isfinite(loss.detach())).float()
        self.gradients[-2:] = torch.stack([is_fault, is_fault.new_tensor(stop)])
        self.sum_over_ranks(self.gradients)
        norm = (gradients := self.gradients[:-2].div_(self.loss_scale.value)).norm()
        value, faults, stops = torch.cat([norm[None], self.gradients[-2:]]).tolist()
        finite = math.isfinite(value) and not faults
        self.stop_asked = stops > 0
        if finite:
            if self.clip_norm:
                gradients.mul_((self.clip_norm / (norm + 1e-6)).clamp(max=1.0))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        return finite

    def count(self, finite: bool) -> None:
        """Close an update that did, or did not, move the weights."""
        # An overflow of scaled gradients is how fp16 finds its scale, not a fault.
        is_fault = bool(self.gradients[-2]) or self.loss_scale.value <= 1
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + is_fault
        self.skipped += not finite
        self.loss_scale.update(finite)
        self.step += 1
        self.average.update(self.parameters.items(), self.step)

    def save(self, checkpoints: Checkpoints, more: Mapping[str, Any]) -> None:
        """A checkpoint after the current step, with tensors of the caller; called by every rank."""
        progress = {
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "loss_scale": [self.loss_scale.value, self.loss_scale.finite_steps],
        }
        checkpoints.save(self.step, self._state(more), progress)

    def resume(self, checkpoints: Checkpoints, more: Mapping[str, Any]) -> list[str]:
        """Go on from the newest valid checkpoint, if there is one; what is to be said about it."""
        found = checkpoints.resume(self._state(more))
        if not found.step:
            return found.said
        state, progress = found.state, found.progress
        for name, parameter in self.trained.items():
            self.optimizer.state[parameter].update(state["moments"][name])
        self.step, self.skipped = found.step, progress["skipped"]
        self.skipped_in_a_row = progress["skipped_in_a_row"]
        self.loss_scale.value, self.loss_scale.finite_steps = progress["loss_scale"]
        return found.said

    def sum_over_ranks(self, values: Tensor) -> None:
        """Replace a tensor, in place, by its sum over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(values)

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The precision that the forward pass is computed in."""
        is_used = self.precision in DTYPES
        return torch.autocast(device.type, DTYPES.get(self.precision), enabled=is_used)

    def _state(self, more: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "model": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "moments": adam_moments(self.optimizer, self.trained.items()),
            "average": self.average.state_dict(),
            **more,
        }

    def _flat_gradients(self) -> Tensor:
        """One vector that all gradients are views of, and two elements more.

        They count the ranks whose loss is not finite, and those that are asked to stop.

        The buckets of DistributedDataParallel are laid out anew after the first update: a resumed
        run would sum in another order.
        """
        sizes = [parameter.numel() for parameter in self.trained.values()]
        device = next(iter(self.trained.values())).device
        flat = torch.zeros(sum(sizes) + 2, device=device)
        for parameter, part in zip(self.trained.values(), flat[:-2].split(sizes), strict=True):
            # Laid out as the parameter is: the fused optimizer walks both in memory order.
            parameter.grad = part.as_strided(parameter.shape, parameter.stride())
        return flat


def to_device(batch: Tensor, device: torch.device) -> Tensor:
    """A batch from the loader, copied while the GPU goes on."""
    if device.type == "cuda":
        return batch.pin_memory().to(device, non_blocking=True)
    return batch.to(device)
