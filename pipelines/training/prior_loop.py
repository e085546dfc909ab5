"""The training loop of the prior: without Ray or MLflow, on one process or many."""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from models.prior import Prior, PriorConfig
from pipelines.training.block_history import BlockRecord
from pipelines.training.checkpoint import Checkpoints
from pipelines.training.pace import Pace, due
from pipelines.training.prior_trainer import PriorTrainer
from pipelines.training.prior_training import Cadence, PriorTraining
from pipelines.training.rewinding import rewind_from_spike
from pipelines.training.token_loader import TokenLoader
from pipelines.training.validation import HeldOut


def train_prior(
    model: PriorConfig,
    training: PriorTraining,
    *,
    cadence: Cadence,
    loader: TokenLoader,
    device: torch.device,
    checkpoints: Path,
    on_log: Callable[[int, dict[str, float]], None],
    on_resume: Callable[[int, list[str]], None],
    on_weights: Callable[[int, dict[str, Tensor]], None],
    on_blocks: Callable[[int, BlockRecord], None] = lambda step, record: None,
    on_odd: Callable[[int, int, str], None] = lambda step, batch, why: None,
    held_out: HeldOut | None = None,
    on_validation: Callable[[int, dict[str, float]], None] = lambda step, losses: None,
    is_asked_to_stop: Callable[[], bool] = lambda: False,
    beat: Callable[[str], None] = lambda doing: None,
    on_notice: Callable[[int, str], None] = lambda step, text: None,
    is_machine_leaving: Callable[[], bool] = lambda: False,
) -> bool:
    """Train to the last step, or until any rank is asked to stop; whether it is the last.

    The effects are the caller's. `on_log` takes metrics and `on_blocks` the resblocks' record,
    every `log_every` steps, `on_weights` the averaged weights, every `sample_every` steps and at
    the end; empty on all ranks but 0. `on_validation` takes the losses on `held_out`, if there are
    such rows, every `validate_every` steps and at the end. `on_odd` is told of updates whose loss
    jumped, or that were skipped, and their batches' numbers; `on_notice` takes words for a person.
    Every rank calls them; the caller acts on rank 0. `beat` is told
    what comes next. `is_machine_leaving` is asked every `ask_every` steps, by all ranks together,
    and gives all the same: once true, there is a checkpoint at once, and the training goes on.
    """
    trainer = PriorTrainer(model, training, device)
    settings = {"prior": asdict(model), "training": training.settings()}
    saved = Checkpoints(
        checkpoints, keep=cadence.keep_checkpoints, settings=settings, on_failure=on_notice
    )
    said = trainer.resume(saved)
    on_resume(trainer.step, said)
    pace = Pace(trainer.step)
    batches = map(loader.batch, trainer.data)
    with saved:
        while trainer.step < training.steps:
            beat(f"the batch of update {trainer.step + 1}")
            batch = pace.take(batches)
            beat(f"update {trainer.step + 1}")
            metrics = trainer.update(batch, stop=is_asked_to_stop())
            step = trainer.step
            if why := _odd(trainer, metrics):
                on_odd(step, trainer.data.next - 1, why)
            is_due = due(step, training.steps)
            if is_due(cadence.log_every):
                record = trainer.block_record()
                rates = pace.rates(step, training.batch_samples)
                on_log(step, {**metrics, **rates, **_scale_metrics(trainer, record)})
                on_blocks(step, record)
            if held_out and is_due(cadence.validate_every):
                beat("the losses on held-out rows")
                on_validation(step, trainer.held_out_losses(held_out))
            # No checkpoint amid a spike that the training will go back from.
            spikes = trainer.spikes.may_be_followed_by_rewind
            leaving = step % cadence.ask_every == 0 and is_machine_leaving()
            save = is_due(cadence.checkpoint_every) and not spikes
            if save or leaving or trainer.stop_asked:
                beat("the checkpoint")
                trainer.save(saved)
            if trainer.stop_asked and step < training.steps:
                return False
            if step % cadence.sample_every == 0 and step < training.steps:
                beat("the pictures")
                on_weights(step, trainer.averaged_weights())
            if trainer.has_spiked and rewind_from_spike(trainer, saved, on_notice, on_resume):
                pace = Pace(trainer.step)
    beat("the model file")
    on_weights(trainer.step, trainer.averaged_weights())
    return True


def load_weights(model: PriorConfig, weights: dict[str, Tensor]) -> Prior:
    """A whole prior in eval mode from gathered weights."""
    with torch.device("meta"):
        prior = Prior(model)
    prior.load_state_dict(weights, strict=True, assign=True)
    return prior.eval()


def _scale_metrics(trainer: PriorTrainer, record: BlockRecord) -> dict[str, float]:
    """log2 of the resblocks' gradient scales, if they are in use."""
    if not trainer.training.scales_resblocks:
        return {}
    return {
        "gradient_scale_log2.lowest": float(record.scales.min()),
        "gradient_scale_log2.mean": float(record.scales.mean()),
        "gradient_scale_log2.highest": float(record.scales.max()),
    }


def _odd(trainer: PriorTrainer, metrics: dict[str, float]) -> str:
    """What is odd about the last update; empty if nothing is. The same on all ranks."""
    loss = metrics["loss"]
    if not math.isfinite(loss):
        return f"its loss is {loss}"
    if trainer.skipped_in_a_row:
        return "its gradient is not finite"
    return f"its loss jumped to {loss:.4f}" if trainer.spikes.in_a_row else ""
