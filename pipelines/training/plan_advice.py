"""Why a training does not fit a card, and the nearest change with which it does."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from pipelines.training.plan_memory import Setting, peak_memory
from pipelines.training.prior_training import PriorOptimizerConfig, PriorTraining, Recompute


@dataclass(frozen=True)
class Advice:
    """Options as they are typed, and the bytes that a worker then needs."""

    options: tuple[str, ...]
    peak: float


def nearest_that_fits(setting: Setting, memory: float) -> Advice | None:
    """The fewest changes with which the training fits; of equally many, those that cost least time.

    The batch and the steps stay as they are: what is learned does not change, but for the formats
    of the optimizer's state. None if no such change is enough.
    """
    found: list[tuple[int, int, Advice]] = []
    for order, changes in enumerate(itertools.product(*_choices(setting))):
        options = tuple(option for option, _ in changes if option)
        if found and len(options) > found[0][0]:
            continue
        try:
            tried = _changed(setting, [fields for _, fields in changes])
        except ValueError:  # options that exclude each other
            continue
        peak = sum(peak_memory(tried).values())
        if options and peak <= memory:
            found.append((len(options), order, Advice(options, peak)))
            found.sort(key=lambda entry: entry[:2])
    return found[0][2] if found else None


def _changed(setting: Setting, changes: Sequence[dict[str, Any]]) -> Setting:
    training = setting.training
    for fields in changes:
        training = _with(training, fields)
    return Setting(
        model=setting.model, training=training, workers=setting.workers, device=setting.device
    )


def _choices(setting: Setting) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """What may be changed, with the fields it sets; no change first. Last what costs the least."""
    training, unchanged = setting.training, [("", dict[str, Any]())]
    compact = {"master": "split", "step": "in_backward", "clip_norm": 0.0, "keep_on": "host"}
    yield unchanged + [
        (
            "--training.optimizer.master split --training.optimizer.step in_backward "
            "--training.optimizer.clip-norm 0 --training.averaging.keep-on host",
            compact,
        )
        for _ in range(setting.workers == 1 and training.optimizer.master == "fp32")
    ]
    yield unchanged + [
        ("--training.optimizer.moments bf16", {"moments": "bf16"})
        for _ in range(training.optimizer.moments == "fp32")
    ]
    group = training.sharding.group_size
    yield unchanged + [
        (f"--training.sharding.group-size {size}", {"group_size": size})
        for size in (2 * group, 4 * group, 8 * group)
        if size <= setting.workers
    ]
    order = list(get_args(Recompute))
    yield unchanged + [
        (f"--training.recompute {choice}", {"recompute": choice})
        for choice in order[order.index(training.recompute) + 1 :]
    ]
    share = training.batch_samples // setting.workers
    yield unchanged + [
        (f"--training.micro-batches {parts}", {"micro_batches": parts})
        for parts in (2 * training.micro_batches, 4 * training.micro_batches, share)
        if parts > training.micro_batches and share % parts == 0
    ]


def _with(training: PriorTraining, fields: dict[str, Any]) -> PriorTraining:
    """A training with such fields, whichever of its parts has them."""
    own = {name: value for name, value in fields.items() if hasattr(training, name)}
    of_optimizer = {
        name: value for name, value in fields.items() if hasattr(PriorOptimizerConfig, name)
    }
    if "group_size" in fields:
        own["sharding"] = replace(training.sharding, group_size=fields["group_size"])
    if "keep_on" in fields:
        own["averaging"] = replace(training.averaging, keep_on=fields["keep_on"])
    if of_optimizer:
        own["optimizer"] = replace(training.optimizer, **of_optimizer)
    return replace(training, **own)
