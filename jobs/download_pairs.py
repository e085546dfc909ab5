"""Fetch the pictures of a URL list: urls → OUTPUT (raw dataset), a reason for every row lost."""

import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from jobs import runtime, shards
from jobs.configs.download_pairs import PRESETS, DownloadPairsJob
from pipelines.data import estimates
from pipelines.data.download import STAGE, commit_download, download_shard
from pipelines.data.stage import DatasetWriter
from pipelines.data.urls import UrlList, read_url_list

if TYPE_CHECKING:
    from ray.data import Dataset


def main(argv: Sequence[str] | None = None) -> int:
    return runtime.run_job(STAGE, PRESETS, download, argv, describe)


def describe(job: DownloadPairsJob) -> list[str]:
    """The lines below the config of a dry run."""
    urls = read_url_list(job.urls, rows_per_shard=job.download.rows_per_shard)
    pending = len(_writer(job, urls).pending())
    return [
        f"fetch {urls.table.num_rows:,} pairs of {job.urls} ({urls.digest[:12]})",
        f"in {len(urls.shard_ids):,} shards, of which {pending:,} are missing",
        f"write {job.output}",
        *_expected(job, urls),
    ]


def _expected(job: DownloadPairsJob, urls: UrlList) -> list[str]:
    if not job.dry_run_sample:
        return ["for an estimate of what is lost and how long it takes: --dry-run-sample 200"]
    found = estimates.estimate(
        urls.table.slice(0, job.dry_run_sample),  # in the order of a hash: drawn at random
        urls.table.num_rows,
        lambda rows: download_shard(rows, job.download),
    )
    measured = f"as measured here just now, {job.download.fetch.concurrency} at once"
    return estimates.lines(found, shards=len(urls.shard_ids), measured=measured)


def download(job: DownloadPairsJob) -> dict[str, Any]:
    """Fetch what is missing."""
    urls = read_url_list(job.urls, rows_per_shard=job.download.rows_per_shard)
    writer = _writer(job, urls)

    def graph(pending: list[str]) -> "Dataset":
        rows = [{"shard": shard} | urls.shard(shard).to_pydict() for shard in pending]
        work = partial(commit_download, writer=writer, config=job.download)
        return shards.one_block_each(rows).map(work, num_cpus=job.cpus_per_shard)

    return shards.run_data_stage(job, writer, graph, parents={})


def _writer(job: DownloadPairsJob, urls: UrlList) -> DatasetWriter:
    return DatasetWriter(
        path=job.output.resolve(),
        stage=STAGE,
        config=job.download.identity(),
        inputs={"urls": urls.digest},
        sources={"urls": str(job.urls.resolve())},
        shards=urls.shard_ids,
    )


if __name__ == "__main__":
    sys.exit(main())
