"""Running a data stage on Ray Data: one row per pending shard, committed where it was made."""

import logging
from collections.abc import Callable, Mapping
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


def run_data_stage(
    job: Job, writer: DatasetWriter, graph: Graph, *, parents: Mapping[str, Path]
) -> dict[str, Any]:
    """Do what is missing of a dataset and give its summary; no Ray is started if nothing is.

    `parents` are the outputs that this one is made of, by input name.
    """
    with plan.lease(job.output):
        writer.claim()
        if writer.finished():
            runtime.nothing_to_do(job.output)
            manifest = Manifest.load(job.output, stage=writer.stage)
        else:
            manifest = _run(job, writer, graph, parents)
        if not (job.output / REPORT).exists():
            write_report(job.output / REPORT, lineage(manifest))
    return {
        "stage": manifest.stage,
        "rows_in": manifest.rows_in,
        "rows_out": manifest.rows_out,
        "dropped": manifest.dropped,
        "manifest_digest": manifest.digest,
        "output": job.output,
    }


def one_block_each(rows: list[dict[str, Any]]) -> "Dataset":
    """A dataset whose rows are worked on apart.

    Ray Data would pack small rows into one block, and run them in one task.
    """
    import ray.data

    return ray.data.from_items(rows, override_num_blocks=len(rows))


def _run(job: Job, writer: DatasetWriter, graph: Graph, parents: Mapping[str, Path]) -> Manifest:
    with tracking.open_run(
        job.tracking,
        stage=writer.stage,
        settings=writer.config,
        tags=run_tags(writer.inputs, parents),
        directory=job.output,
        uri=runtime.tracking_uri(),
    ) as tracker:
        if pending := writer.pending():
            _run_pending(writer, pending, graph)
        manifest = writer.seal()
        counts = {"rows_in": manifest.rows_in, "rows_out": manifest.rows_out}
        drops = {f"dropped.{reason}": count for reason, count in manifest.dropped.items()}
        tracker.log_metrics(counts | drops, step=0)
        tracker.set_tags({"manifest_digest": manifest.digest})
        write_report(job.output / REPORT, lineage(manifest))
        tracker.log_file(job.output / REPORT)
        return manifest


def _run_pending(writer: DatasetWriter, pending: list[str], graph: Graph) -> None:
    with (
        runtime.ray_session(),
        Progress(writer.stage, len(writer.shards), "shards") as progress,
    ):
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # ours suits terminals and logs
        # It tells of every start and end, and warns that its bars are off.
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
        progress.set(len(writer.shards) - len(pending))
        for _ in graph(pending).iter_rows():
            progress.advance()
