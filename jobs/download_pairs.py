"""Fetch the pictures of a URL list: urls → OUTPUT (raw dataset), a reason for every row lost.

With ``--retry-of RAW`` fetch again what failed of a finished one, by cause: RAW → OUTPUT.
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from jobs import runtime, shards
from jobs.configs.download_pairs import PRESETS, DownloadPairsJob
from pipelines.data import bad_files, estimates
from pipelines.data.causes import has_cause, parse_causes
from pipelines.data.download import STAGE, commit_download, commit_retry, download_shard
from pipelines.data.stage import DatasetWriter, Manifest
from pipelines.data.storage import Location
from pipelines.data.travelling import pack
from pipelines.data.url_formats import UrlColumns
from pipelines.data.urls import UrlList, read_url_list


def main(argv: Sequence[str] | None = None) -> int:
    return runtime.run_job(STAGE, PRESETS, download, argv, describe)


def describe(job: DownloadPairsJob) -> list[str]:
    """The lines below the config of a dry run."""
    if job.retry_of is not None:
        old = Manifest.load(job.retry_of, stage=STAGE)
        causes = parse_causes(job.retry_failed)
        again = sum(count for reason, count in old.dropped.items() if has_cause(reason, causes))
        return [
            f"fetch {again:,} of {sum(old.dropped.values()):,} dropped rows of {old.path} again",
            f"in {len(old.shards):,} shards, of which {len(_retry_writer(job, old).pending()):,} "
            "are missing",
            f"write {job.output}",
        ]
    urls = _read_list(job)
    pending = len(_writer(job, urls).pending())
    return [
        f"fetch {urls.table.num_rows:,} pairs of {job.urls} ({urls.digest[:12]})",
        f"in {len(urls.shard_ids):,} shards, of which {pending:,} are missing",
        f"write {job.output}",
        *bad_files.in_words(urls.quarantined),
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
    if job.retry_of is not None:
        return _retry(job, job.retry_of)
    urls = _read_list(job)
    writer = _writer(job, urls)

    commit = partial(commit_download, writer=writer, config=job.download)
    done = shards.run_data_stage(
        job,
        writer,
        commit,
        cpus=job.cpus_per_shard,
        parents={},
        row_of=lambda shard: {"rows": pack(urls.shard(shard))},
    )
    return done | shards.say_left_out(urls.quarantined)


def _retry(job: DownloadPairsJob, retry_of: Location) -> dict[str, Any]:
    old = Manifest.load(retry_of, stage=STAGE)
    writer = _retry_writer(job, old)
    causes = parse_causes(job.retry_failed)
    commit = partial(commit_retry, writer=writer, config=job.download, old=old, causes=causes)
    return shards.run_data_stage(
        job, writer, commit, cpus=job.cpus_per_shard, parents={"raw": retry_of}
    )


def _read_list(job: DownloadPairsJob) -> UrlList:
    columns = UrlColumns(url=job.url_column, caption=job.caption_column)
    return read_url_list(
        job.urls,
        rows_per_shard=job.download.rows_per_shard,
        columns=columns,
        on_bad_file=job.on_bad_file,
    )


def _writer(job: DownloadPairsJob, urls: UrlList) -> DatasetWriter:
    return DatasetWriter(
        path=job.output.resolve(),
        stage=STAGE,
        config=job.download.identity() | bad_files.in_settings(urls.quarantined),
        inputs={"urls": urls.digest},
        sources={"urls": str(job.urls.resolve())},
        shards=urls.shard_ids,
    )


def _retry_writer(job: DownloadPairsJob, old: Manifest) -> DatasetWriter:
    settings = job.download.identity()
    if settings["resize"] != old.config["resize"]:
        raise ValueError(
            f"a retry must store pictures as {old.path} does, {old.config['resize']}, "
            f"got {settings['resize']}"
        )
    # Its shards are the old ones, whatever rows_per_shard this preset has.
    settings["rows_per_shard"] = old.config["rows_per_shard"]
    if bad_files.QUARANTINED in old.config:  # what the old one lacks, this one lacks too
        settings[bad_files.QUARANTINED] = old.config[bad_files.QUARANTINED]
    return DatasetWriter(
        path=job.output.resolve(),
        stage=STAGE,
        config=settings | {"retry_failed": list(parse_causes(job.retry_failed))},
        inputs={"raw": old.digest},
        sources={"raw": str(old.path.resolve())},
        shards=[commit.shard for commit in old.shards],
    )


if __name__ == "__main__":
    sys.exit(main())
