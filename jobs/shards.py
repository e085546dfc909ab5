"""Running a data stage on Ray: one task per pending shard, committed where it was made."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from jobs import runtime
from jobs.configs.job import Job
from jobs.progress import Progress
from jobs.ray_session import ray_session
from pipelines.data import bad_files, garbage, plan
from pipelines.data.bad_files import BadFile
from pipelines.data.stage import DatasetWriter, Manifest
from pipelines.data.storage import Location
from pipelines.data.travelling import commit_one
from pipelines.training import mlflow_run, tracking
from pipelines.training.run_directory import run_tags

REPORT = "report.html"
TASKS_PER_PLACE = 2  # one at work, one on its way

# What a worker is given besides a shard's name, by shard.
RowOf = Callable[[str], Mapping[str, Any]]
# Makes and commits the shard that a row names.
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
    job: Job,
    writer: DatasetWriter,
    work: Work,
    *,
    parents: Mapping[str, Path | Location],
    least_cpus: int = 1,
) -> dict[str, Any]:
    """Do what is missing of a dataset and give its summary; no Ray is started if nothing is.

    `parents` are the outputs that this one is made of, by input name. A Ray of its own has
    `least_cpus` logical processors at least: a stage of actors that wait for each other needs more
    than a small machine has, tasks need no more than there are.
    """
    figures: Mapping[str, float] = {}
    with plan.lease(job.output):
        writer.claim()
        if writer.finished():
            runtime.nothing_to_do(job.output)
            manifest = Manifest.load(job.output, stage=writer.stage)
            if not writer.place.is_s3:
                tracking.catch_up(writer.place.path, runtime.tracking_uri())
            if not (writer.place / REPORT).exists():
                with _run_directory(writer.place) as directory:
                    _write_report(directory, manifest)
        else:
            with _run_directory(writer.place) as directory:
                manifest, figures = _run(job, writer, work, parents, directory, least_cpus)
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


def say_left_out(quarantined: Sequence[BadFile]) -> dict[str, int]:
    """Print which input files were left out; what the summary says of them."""
    if not quarantined:
        return {}
    print("\n".join(bad_files.in_words(quarantined)), flush=True)
    return {bad_files.QUARANTINED: len(quarantined)}


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
    least_cpus: int,
) -> tuple[Manifest, Mapping[str, float]]:
    with tracking.open_run(
        job.tracking,
        stage=writer.stage,
        settings=writer.config,
        tags=run_tags(writer.inputs, parents),
        directory=directory,
        uri=runtime.tracking_uri(),
    ) as tracker:
        with ExitStack() as session:
            figures: Mapping[str, float] = {}
            if pending := writer.pending():
                session.enter_context(ray_session(least_cpus))
                figures = work(pending)
            # While Ray stands, so that MLflow is told while Ray takes its second to end.
            manifest = writer.seal()
            counts = {"rows_in": manifest.rows_in, "rows_out": manifest.rows_out}
            drops = {f"dropped.{reason}": count for reason, count in manifest.dropped.items()}
            tracker.log_metrics({**counts, **drops, **figures}, step=0)
            tracker.set_tags({"manifest_digest": manifest.digest})
            _write_report(directory, manifest)
            tracker.log_file(directory / REPORT)
        return manifest, figures


def _write_report(directory: Path, manifest: Manifest) -> None:
    from pipelines.data.report import lineage, write_report  # 0.3 s, which no worker waits for

    write_report(directory / REPORT, lineage(manifest))


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
    """Have workers commit the pending shards, a task each, and show how far they are.

    Plain tasks: Ray Data would add 0.7 s of imports to the driver and to each worker, and actors of
    its own. What a worker raises is raised here; a worker that dies is started again.
    """
    import ray

    cpus = fitting_cpus(writer.stage, cpus)
    task = ray.remote(commit_one).options(
        num_cpus=cpus, max_retries=-1, scheduling_strategy="SPREAD"
    )
    shared = ray.put(commit)
    left = iter(pending)
    under_way: list[Any] = []
    with Progress(writer.stage, len(writer.shards), "shards") as progress:
        progress.set(len(writer.shards) - len(pending))
        try:
            while True:
                # The rows of those that wait stay here: the list may be longer than memory.
                room = _places(cpus) * TASKS_PER_PLACE - len(under_way)
                for shard in islice(left, room):
                    under_way.append(task.remote(shared, {"shard": shard, **row_of(shard)}))
                if not under_way:
                    return {}
                ready, under_way = ray.wait(under_way)
                ray.get(ready)
                progress.advance(len(ready))
        finally:
            for ref in under_way:
                ray.cancel(ref)


def _places(cpus: float) -> int:
    """Tasks that the cluster can work on at once, as large as it is now."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 0.0) / cpus))
