"""The figures of docs/recipes, made anew from the plan: `python -m tests.benchmarks.recipes`.

A page keeps its words; what stands between the two marks is the plan's. A test compares them.
"""

from pathlib import Path

from jobs.configs.train_prior import PRESETS
from jobs.plan_table import does_not_fit
from pipelines.training.training_plan import GIB, TrainingPlan, plan_training

FOLDER = Path(__file__).parents[2] / "docs" / "recipes"
START, END = "<!-- the plan's figures -->", "<!-- end of the plan's figures -->"


def main() -> None:
    for preset in PRESETS:
        page = FOLDER / f"{preset}.md"
        page.write_text(renewed(page.read_text(), preset))


def renewed(page: str, preset: str) -> str:
    """The page with the plan's figures of today."""
    before, rest = page.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{figures(preset)}{END}{after}"


def figures(preset: str) -> str:
    """A table, in Markdown."""
    job = PRESETS[preset][1]
    workers = job.workers.num_workers
    plan = plan_training(job.prior, job.training, workers, job.plan)
    assert does_not_fit(plan) is None
    kinds = ", ".join(
        f"{kind} {size / GIB:.1f}" for kind, size in plan.memory.items() if size >= 0.05 * GIB
    )
    repeated = f"{plan.repeated_flop:.1e}" if plan.repeated_flop else "none"
    rows = {
        "parameters": f"{plan.parameters:,}",
        "tokens": f"{plan.tokens:,} in {job.training.steps:,} updates of "
        f"{job.training.batch_samples:,} pictures",
        "FLOP": f"{plan.flop:.2e}, and {repeated} of recomputation",
        "memory of a worker": f"{plan.peak / GIB:.1f} GiB" + (f" ({kinds})" if kinds else ""),
        "a checkpoint": f"{plan.checkpoint_bytes / 1e9:,.2f} GB",
        **_time(plan),
        **_network(plan),
    }
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {text} |\n" for name, text in rows.items())


def _time(plan: TrainingPlan) -> dict[str, str]:
    if plan.flop < 1e15:
        return {}  # less than a second of a GPU's time
    card, workers = plan.config.card, plan.setting.workers
    hours = " / ".join(f"{duration.gpu_hours:,.3g}" for duration in plan.durations)
    if plan.durations[-1].gpu_hours >= 100:
        hours = " / ".join(f"{duration.gpu_hours:,.0f}" for duration in plan.durations)
    days = " / ".join(f"{duration.days:.2g}" for duration in plan.durations)
    mfu = " / ".join(f"{duration.mfu:.0%}" for duration in plan.durations)
    failures = plan.durations[0].failures
    return {
        f"{card} hours at {mfu} MFU": hours,
        f"days on {workers:,}": days,
        "expected failures": f"{failures:.2g} at the lowest MFU, one each "
        f"{plan.hours_to_failure:,.0f} hours",
    }


def _network(plan: TrainingPlan) -> dict[str, str]:
    network = plan.network
    if network is None:
        return {}
    return {
        "between machines, an update": f"{network.whole_bytes / 1e9:.1f} GB of each; with PowerSGD "
        f"{network.compressed_bytes / 1e9:.1f} GB, which pays below "
        f"{network.pays_below_gbit:,.0f} Gb/s at {plan.durations[-1].mfu:.0%} MFU"
    }


if __name__ == "__main__":
    main()
