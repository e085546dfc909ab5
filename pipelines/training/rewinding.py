"""Going back to before a spike of the loss, and past the batches around it."""

from collections.abc import Callable

from pipelines.training.checkpoint import Checkpoints
from pipelines.training.prior_trainer import PriorTrainer


def rewind_from_spike(
    trainer: PriorTrainer,
    saved: Checkpoints,
    on_notice: Callable[[int, str], None],
    on_resume: Callable[[int, list[str]], None],
) -> bool:
    """Say that the loss has jumped and, if that is wanted and possible, go back in time.

    The trainer then is at an earlier step, `on_resume` was told, and the batches around the spike
    do not come again. Whoever resumes from the checkpoint that was gone back to, before there is a
    newer one, meets the same spike and does the same. Every rank calls it; whether it went back.
    """
    config, spikes, step = trainer.training.spikes, trainer.spikes, trainer.step
    past, rewinds = trainer.data.next, spikes.rewinds + 1
    first = past - config.patience
    jumped = (
        f"THE LOSS HAS JUMPED: above {spikes.limit:.4f} in {config.patience} updates in a row, up "
        f"to {step}, whose batches were {first} to {past - 1}"
    )
    if not config.rewind:
        on_notice(step, f"{jumped}; the training goes on as it is (training.spikes.rewind)")
        return False
    if not spikes.may_rewind:
        on_notice(step, f"{jumped}; after {spikes.rewinds} rewinds the training goes on as it is")
        return False
    said = trainer.resume(saved)
    if trainer.step == step:
        on_notice(step, f"{jumped}; there is no checkpoint to go back to yet")
        return False
    trainer.spikes.rewinds = rewinds
    first_out, past_out = max(first - config.skip_before, 0), past + config.skip_after
    trainer.data.leave_out(first_out, past_out)
    left_out = f"batches {first_out} to {past_out - 1} are left out"
    on_resume(trainer.step, [*said, f"{jumped}; back at update {trainer.step}, {left_out}"])
    return True
