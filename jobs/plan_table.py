"""The plan of a training, as `--dry-run` prints it."""

import io
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from pipelines.training.plan_advice import nearest_that_fits
from pipelines.training.training_plan import GIB, TrainingPlan

WIDTH = 100


def plan_lines(plan: TrainingPlan) -> list[str]:
    """Readable, in plain text."""
    console = Console(file=io.StringIO(), width=WIDTH, no_color=True)
    on_gpus = plan.setting.device == "cuda"
    for table in (_work(plan), _memory(plan), *([_time(plan)] if on_gpus else [])):
        console.print(table)
    for line in (*_failures(plan), *_network(plan)) if on_gpus else ():
        console.print(line, highlight=False, soft_wrap=True)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def does_not_fit(plan: TrainingPlan) -> str | None:
    """Why not, and the nearest change that does; None if it fits."""
    if plan.fits:
        return None
    kinds = sorted(plan.memory.items(), key=lambda entry: -entry[1])[:3]
    largest = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in kinds)
    why = (
        f"does not fit: a worker must have {plan.peak / GIB:.1f} GiB "
        f"and may use {plan.config.memory / GIB:.1f}, because of {largest} GiB"
    )
    advice = nearest_that_fits(plan.setting, plan.config.memory)
    if advice is None:
        return f"{why}; no such change is enough: take a smaller model, or a larger card"
    return f"{why}; the nearest change that does is {' '.join(advice.options)} " + (
        f"({advice.peak / GIB:.1f} GiB)"
    )


def _work(plan: TrainingPlan) -> Table:
    setting, training = plan.setting, plan.setting.training
    table = Table(title="What is trained", show_header=False)
    resblocks, steps = setting.model.n_resblocks, training.steps
    table.add_row("parameters", f"{plan.parameters:,}, in {resblocks} resblocks")
    table.add_row("tokens", f"{plan.tokens:,}, in {steps:,} updates of {training.batch_samples:,}")
    repeated = f"{plan.repeated_flop:.2g}" if plan.repeated_flop else "none"
    table.add_row("FLOP", f"{plan.flop:.3g}, and {repeated} of recomputation")
    groups = setting.workers // setting.shards
    table.add_row(
        "workers", f"{setting.workers:,}: {groups:,} replica(s) in {setting.shards} parts"
    )
    table.add_row("pictures at once", f"{setting.pictures:,} on a worker")
    table.add_row("a checkpoint", f"{plan.checkpoint_bytes / 1e9:,.1f} GB")
    return table


def _memory(plan: TrainingPlan) -> Table:
    table = Table(title="Memory of a worker, at most")
    table.add_column("kind")
    table.add_column("GiB", justify="right")
    for kind, size in plan.memory.items():
        table.add_row(kind, f"{size / GIB:,.2f}")
    table.add_section()
    where = plan.config.card if not plan.config.gpu_memory_gib else "the card"
    if plan.setting.device == "cpu":
        table.add_row("together", f"{plan.peak / GIB:,.2f}")
        return table
    table.add_row(f"together, of {where}'s", f"{plan.peak / GIB:,.2f}")
    table.add_row("that it has", f"{plan.config.memory / GIB:,.2f}")
    return table


def _time(plan: TrainingPlan) -> Table:
    price = plan.config.price_per_gpu_hour
    table = Table(title=f"Time on {plan.setting.workers:,} {plan.config.card}")
    for column in ("MFU", "s an update", "GPU-hours", "days", *(["price"] if price else [])):
        table.add_column(column, justify="right")
    table.add_column("failures", justify="right")
    for duration in plan.durations:
        table.add_row(
            f"{duration.mfu:.0%}",
            f"{duration.seconds_per_update:.3g}",
            f"{duration.gpu_hours:,.3g}"
            if duration.gpu_hours < 100
            else f"{duration.gpu_hours:,.0f}",
            f"{duration.days:.3g}",
            *([f"{duration.price:,.0f}"] if price else []),
            f"{duration.failures:.2g}",
        )
    return table


def _failures(plan: TrainingPlan) -> Iterator[str]:
    rate = plan.config.gpu_hours_per_failure
    yield f"a failure each {plan.hours_to_failure:,.0f} hours, at one in {rate:,.0f} GPU-hours"
    if write := plan.checkpoint_seconds():
        yield (
            f"checkpoints: {write:.0f} s to write, one each "
            f"{plan.checkpoint_interval() / 60:,.0f} minutes loses the least"
        )
    else:
        yield "for the interval between checkpoints: --plan.checkpoint-gb-per-second"


def _network(plan: TrainingPlan) -> Iterator[str]:
    network = plan.network
    if plan.group_spans_machines:
        yield (
            f"{plan.setting.shards} workers share the weights, a machine has "
            f"{plan.config.gpus_per_node}: every resblock is gathered over the network, and how "
            "long that takes is not planned"
        )
    if network is None:
        return
    power_sgd = plan.setting.training.sharding.power_sgd
    has = plan.config.node_gbit_per_second
    pays = "pays" if has < network.pays_below_gbit else "does not pay"
    yield (
        f"between machines, an update: {network.whole_bytes / 1e9:,.1f} GB each; with PowerSGD, "
        f"which is {'on' if power_sgd.enabled else 'off'}, {network.compressed_bytes / 1e9:,.1f} GB"
    )
    yield (
        f"PowerSGD pays below {network.pays_below_gbit:,.0f} Gb/s a machine, where whole gradients "
        f"no longer hide behind the backward pass; at {has:,.0f} it {pays}"
    )
