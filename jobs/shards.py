"""Running a data stage on Ray Data: one row per pending shard, committed where it was made."""

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import runtime
from jobs.configs.job import Job
from jobs.progress import Progress
from pipelines.data import garbage, plan
from pipelines.data.collapse import NetworkCollapsed
from pipelines.data.report import lineage, write_report
from pipelines.data.stage import DatasetWriter, Manifest
from pipelines.data.storage import Location
from pipelines.training import mlflow_run, tracking
from pipelines.training.run_directory import run_tags

if TYPE_CHECKING:
    from ray.data import Dataset

REPORT = "report.html"

# What a worker is given besides a shard's name, by shard.
RowOf = Callable[[str], Mapping[str, Any]]
# Makes and commits the shard that a row names; the row may say `collapsed`: that the network died.
Commit = Callable[[dict[str, Any]], dict[str, Any]]
# Commits the pending shards and gives figures for the summary and MLflow.
Work = Callable[[list[str]], Mapping[str, float]]


def run_data_stage(
    job: Job,
    writer: DatasetWriter,
    commit: Commit,
    *,
    cpus: float,
    parents: Mapping[str, Path | Location],
    row_of: RowOf = lambda _: {},
) -> dict[str, Any]:
    """`run_stage` where `commit_each` is all the work."""
    work = partial(commit_each, writer, commit, cpus=cpus, row_of=row_of)
    return run_stage(job, writer, work, parents=parents)


def run_stage(
    job: Job, writer: DatasetWriter, work: Work, *, parents: Mapping[str, Path | Location]
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
            if not (writer.place / REPORT).exists():
                with _run_directory(writer.place) as directory:
                    write_report(directory / REPORT, lineage(manifest))
        else:
            with _run_directory(writer.place) as directory:
                manifest, figures = _run(job, writer, work, parents, directory)
        garbage.collect(writer.place)  # also of a driver that died after its last shard
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


def fitting_cpus(stage: str, asked: float) -> float:
    """Processors for one task: what was asked for, or what the largest node has, and it is said.

    Ray would wait for ever for a node that is large enough.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = max((node.get("CPU", 0.0) for node in nodes), default=0.0)
    if most == 0:
        raise ValueError(f"{stage} must have a node with a processor, the cluster has none")
    if asked > most:
        print(f"{stage}: a task is to have {asked:g} CPUs, but no node has more than {most:g}")
    return float(min(asked, most))


def _run(
    job: Job,
    writer: DatasetWriter,
    work: Work,
    parents: Mapping[str, Path | Location],
    directory: Path,
) -> tuple[Manifest, Mapping[str, float]]:
    with tracking.open_run(
        job.tracking,
        stage=writer.stage,
        settings=writer.config,
        tags=run_tags(writer.inputs, parents),
        directory=directory,
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
        write_report(directory / REPORT, lineage(manifest))
        tracker.log_file(directory / REPORT)
        return manifest, figures


@contextmanager
def _run_directory(output: Location) -> Iterator[Path]:
    """Where a run's files are written: the output or, for one in S3, a copy that is put back."""
    if not output.is_s3:
        yield output.path
        return
    names = (mlflow_run.RUN_FILE, tracking.METRICS_FILE, REPORT)
    with tempfile.TemporaryDirectory(prefix="manray-") as temporary:
        directory = Path(temporary)
        for name in names:
            if (output / name).exists():
                (directory / name).write_bytes((output / name).read())
        try:
            yield directory
        finally:
            for name in names:
                if (directory / name).exists():
                    (output / name).replace((directory / name).read_bytes())


def commit_each(
    writer: DatasetWriter,
    commit: Commit,
    pending: list[str],
    *,
    cpus: float,
    row_of: RowOf = lambda _: {},
) -> dict[str, float]:
    """Have workers commit the pending shards, a task each, and show how far they are."""
    rows = [{"shard": shard, **row_of(shard)} for shard in pending]
    done = one_block_each(rows).map(commit, num_cpus=fitting_cpus(writer.stage, cpus))
    with Progress(writer.stage, len(writer.shards), "shards") as progress:
        progress.set(len(writer.shards) - len(pending))
        for row in done.iter_rows():
            if row.get("collapsed"):
                raise NetworkCollapsed(row["collapsed"])
            progress.advance()
    return {}


def _quiet_ray_data() -> None:
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False  # ours suits logs too
    # It tells of every start and end, and warns that its bars are off.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
