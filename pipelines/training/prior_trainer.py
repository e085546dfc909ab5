"""One update of the prior, and everything that a resumed training must find again as it was."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from models.averaging import IterateAverage
from models.prior import PriorConfig
from models.resblock_scaling import ResblockScales
from pipelines.training.block_history import BlockRecord
from pipelines.training.checkpoint import Checkpoints
from pipelines.training.optimizer import StepSize, adam_moments, build_optimizer, named_masters
from pipelines.training.parallelize import build_prior, full, gradient_means, plain_named_parameters
from pipelines.training.prior_training import PriorTraining
from pipelines.training.prior_updates import PriorUpdates
from pipelines.training.ranks import rank, world_size
from pipelines.training.spikes import DataPosition, SpikeDetector
from pipelines.training.text_weights import TextWeights
from pipelines.training.token_loader import TokenBatch
from pipelines.training.validation import HeldOut, held_out_losses

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SKIPS_IN_A_ROW = 200


class PriorTrainer:
    """The state of a training; every rank holds its shards."""

    def __init__(self, model: PriorConfig, training: PriorTraining, device: torch.device) -> None:
        training.check_workers(world_size())
        self.training, self.device = training, device
        self.prior, self.power_sgd = build_prior(
            model,
            device=device,
            seed=training.seed,
            recompute=training.recompute,
            sharding=training.sharding,
            branch_dtype=DTYPES.get(training.precision),
        )
        self.means = gradient_means(self.prior)
        self.optimizer = build_optimizer(self.prior, training.optimizer)
        self.step_size = StepSize(training.optimizer, training.steps)
        self.average = IterateAverage(self._masters(), training.averaging)
        self.scales = ResblockScales(
            model.n_resblocks, training.scaling, device, training.micro_batches
        )
        self.updates = PriorUpdates(
            self.prior,
            self.optimizer,
            self.scales,
            training.optimizer,
            scaled=training.scales_resblocks,
        )
        self.data = DataPosition()
        self.spikes = SpikeDetector(training.spikes)
        self.has_spiked = False
        """Whether the last update's loss was one spike too many."""
        self.step = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.stop_asked = False

    def update(self, batch: TokenBatch, *, stop: bool = False) -> dict[str, float]:
        """One update on this rank's samples; skipped everywhere if a gradient is not finite.

        `stop` asks all ranks to stop: `stop_asked` then is true on every one, after this update.
        """
        lr = self.step_size.at(self.step)
        self.updates.start(lr)
        measured = self.updates.measure(self._backward(batch), stop=stop)
        applied = measured.finite
        if applied:
            self.updates.apply(measured)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.stop_asked = measured.stop
        self._count(applied)
        self.average.update(self._masters(), self.step)
        total, text, image = measured.losses
        self.step_size.update(total)
        self.has_spiked = self.spikes.look(total)
        return {
            "loss": total,
            "text_loss": text,
            "image_loss": image,
            "grad_norm": measured.norm,
            "lr": lr,
            "skipped_updates": float(self.skipped),
        }

    def block_record(self) -> BlockRecord:
        return self.updates.record(self.step)

    def _backward(self, batch: TokenBatch) -> Tensor:
        """Accumulate the gradients; this rank's (total, text, image) losses."""
        parts = self.training.micro_batches
        micro_batches = list(_split(batch, parts, self.device))
        weights = TextWeights([micro.text_tokens for micro in micro_batches])
        losses = torch.zeros(3, device=self.device)
        for index, micro in enumerate(micro_batches):
            self.means.collects = index == parts - 1
            if isinstance(self.prior, FSDPModule):
                self.prior.set_requires_gradient_sync(index == parts - 1)
            with self._autocast():
                loss = self.prior(micro.text_tokens, micro.image_tokens)
            loss = loss._replace(text=loss.text * weights.of(index))
            total = loss.total
            (total / parts).backward()
            losses += torch.stack([total, *loss]).detach() / parts
        self.means.finish()
        return losses

    def _masters(self) -> Iterator[tuple[str, Tensor]]:
        return named_masters(self.optimizer, plain_named_parameters(self.prior))

    def _autocast(self) -> Any:
        precision = self.training.precision
        if precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[precision])

    def _count(self, applied: bool) -> None:
        self.skipped += not applied
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        # A scale is halved at most once in 125 steps / 2, so that fp16 may well skip some in a row.
        if self.skipped_in_a_row == SKIPS_IN_A_ROW:
            raise RuntimeError(
                f"{SKIPS_IN_A_ROW} updates in a row up to step {self.step} had gradients that were "
                "not finite: lower the step size, or use bf16"
            )

    def held_out_losses(self, held_out: HeldOut) -> dict[str, float]:
        """`validation.…`: losses with the weights as they are and averaged; every rank must ask."""
        return held_out_losses(
            self.prior,
            self.average.shadow,
            held_out,
            batch_samples=self.training.batch_samples
            // (world_size() * self.training.micro_batches),
            device=self.device,
            autocast=self._autocast,
        )

    def averaged_weights(self) -> dict[str, Tensor]:
        """The averaged weights, whole, on rank 0's CPU (empty elsewhere); every rank must ask."""
        is_first = rank() == 0
        weights = {}
        for name, value in self.average.shadow.items():
            whole = full(value)
            if is_first:
                weights[name] = whole.cpu().clone()
        return weights

    def save(self, checkpoints: Checkpoints) -> None:
        """A checkpoint after the current step; every rank must call it."""
        progress = {
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "step_size": self.step_size.plateau.state_dict(),
            "data": self.data.state_dict(),
            "spikes": self.spikes.state_dict(),
            "layout": self._layout(),
        }
        checkpoints.save(self.step, self._state(), progress)

    def resume(self, checkpoints: Checkpoints) -> list[str]:
        """Go on from the newest valid checkpoint, if there is one; what is to be said about it."""
        found = checkpoints.resume(self._state())
        if not found.step:
            return found.said
        state, progress = found.state, found.progress
        self._load(state)
        self.step, self.skipped = found.step, progress["skipped"]
        self.skipped_in_a_row = progress["skipped_in_a_row"]
        self.step_size.plateau.load_state_dict(progress["step_size"])
        self.data.load_state_dict(progress["data"])
        self.spikes.load_state_dict(progress["spikes"])
        before, now = progress["layout"], self._layout()
        changes = [
            f"{name} {before[name]} → {now[name]}" for name in now if before[name] != now[name]
        ]
        if changes:
            found.said.append(f"laid out anew, losses agree to rounding: {', '.join(changes)}")
        return found.said

    def _layout(self) -> dict[str, Any]:
        return {"workers": world_size()} | self.training.layout()

    def _state(self) -> dict[str, Any]:
        """All tensors, by names that do not depend on how the model is wrapped or sharded."""
        return {
            "model": dict(plain_named_parameters(self.prior)),
            "moments": adam_moments(self.optimizer, plain_named_parameters(self.prior)),
            "average": self.average.state_dict(),
            "scales": self.scales.state_dict(),
            "power_sgd": self.power_sgd.state_dict() if self.power_sgd else {},
        }

    def _load(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint put in place of a tensor; most were filled in place."""
        for name, parameter in plain_named_parameters(self.prior):
            for key, value in state["moments"][name].items():
                self.optimizer.state[parameter][key] = value
        self.scales.load_state_dict(state["scales"])


def _split(batch: TokenBatch, parts: int, device: torch.device) -> Iterator[TokenBatch]:
    size = len(batch.text_tokens)
    if size % parts:
        raise ValueError(f"a worker's samples must divide by micro_batches, got {size}, {parts}")
    for text, image in zip(
        batch.text_tokens.split(size // parts), batch.image_tokens.split(size // parts), strict=True
    ):
        yield TokenBatch(text.to(device), image.to(device))
