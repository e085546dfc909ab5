"""Running a data stage on Ray Data: one row per pending shard, committed where it was made."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import runtime
from jobs.configs.job import Job
from jobs.progress import Progress
from pipelines.data import plan
from pipelines.data.report import lineage, write_report
from pipelines.data.stage import DatasetWriter, Manifest
from pipelines.training import tracking
from pipelines.training.run_directory import run_tags

if TYPE_CHECKING:
    from ray.data import Dataset

REPORT = "report.html"

# From the pending shards to a dataset of one row a shard; reading a row has its shard committed.
Graph = Callable[[list[str]], "Dataset"]
# Commits the pending shards and gives figures for the summary and MLflow.
Work = Callable[[list[str]], Mapping[str, float]]


def run_data_stage(
    job: Job, writer: DatasetWriter, graph: Graph, *, parents: Mapping[str, Path]
) -> dict[str, Any]:
    """`run_stage` for a graph whose workers commit the shards themselves."""
    return run_stage(job, writer, partial(read_all, writer, graph), parents=parents)


def run_stage(
    job: Job, writer: DatasetWriter, work: Work, *, parents: Mapping[str, Path]
) -> dict[str, Any]:
    """Do what is missing of a dataset and give its summary; no Ray is started if nothing is.

    `parents` are the outputs that this one is made of, by input name.
    """
    figures: Mapping[str, float] = {}
    with plan.lease(job.output):
        writer.claim()
        if writer.finished():
            runtime.nothing_to_do(job.output)
            manifest = Manifest.load(job.output, stage=writer.stage)
        else:
            manifest, figures = _run(job, writer, work, parents)
        if not (job.output / REPORT).exists():
            write_report(job.output / REPORT, lineage(manifest))
    return {
        "stage": manifest.stage,
        "rows_in": manifest.rows_in,
        "rows_out": manifest.rows_out,
        "dropped": manifest.dropped,
        "manifest_digest": manifest.digest,
        "output": job.output,
        **figures,
    }


def one_block_each(rows: list[dict[str, Any]]) -> "Dataset":
    """A dataset whose rows are worked on apart.

    Ray Data would pack small rows into one block, and run them in one task.
    """
    import ray.data

    return ray.data.from_items(rows, override_num_blocks=len(rows))


def _run(
    job: Job, writer: DatasetWriter, work: Work, parents: Mapping[str, Path]
) -> tuple[Manifest, Mapping[str, float]]:
    with tracking.open_run(
        job.tracking,
        stage=writer.stage,
        settings=writer.config,
        tags=run_tags(writer.inputs, parents),
        directory=job.output,
        uri=runtime.tracking_uri(),
    ) as tracker:
        figures: Mapping[str, float] = {}
        if pending := writer.pending():
            with runtime.ray_session():
                _quiet_ray_data()
                figures = work(pending)
        manifest = writer.seal()
        counts = {"rows_in": manifest.rows_in, "rows_out": manifest.rows_out}
        drops = {f"dropped.{reason}": count for reason, count in manifest.dropped.items()}
        tracker.log_metrics({**counts, **drops, **figures}, step=0)
        tracker.set_tags({"manifest_digest": manifest.digest})
        write_report(job.output / REPORT, lineage(manifest))
        tracker.log_file(job.output / REPORT)
        return manifest, figures


def read_all(writer: DatasetWriter, graph: Graph, pending: list[str]) -> dict[str, float]:
    """Have a graph commit the pending shards, and show how far it is."""
    with Progress(writer.stage, len(writer.shards), "shards") as progress:
        progress.set(len(writer.shards) - len(pending))
        for _ in graph(pending).iter_rows():
            progress.advance()
    return {}


def _quiet_ray_data() -> None:
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False  # ours suits logs too
    # It tells of every start and end, and warns that its bars are off.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
