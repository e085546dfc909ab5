"""Serve a trained model over HTTP until Ctrl-C: Ray Serve, OpenAI's Images API."""

import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from jobs import deployment, runtime
from jobs.configs.serve_sampler import PRESETS, ServeSamplerJob
from jobs.serving_application import checked_files
from pipelines.sampling.access import Access
from pipelines.training import tracking
from pipelines.training.run_directory import run_tags

STAGE = "serve_sampler"
EXAMPLE = "red apple"
KEYS = {
    False: "No keys are asked for: whoever reaches this address may ask for pictures.",
    True: "Requests need a key of the file, see python -m jobs.serve_keys.",
}


def main(argv: Sequence[str] | None = None) -> int:
    return runtime.run_job(STAGE, PRESETS, serve, argv, describe)


def describe(job: ServeSamplerJob) -> list[str]:
    """The lines below the config of a dry run."""
    checked_files(job)
    return [
        f"serve {job.prior} as {job.model_name} at {deployment.base_url(job)}",
        deployment.curl_line(deployment.base_url(job), EXAMPLE),
    ]


def serve(job: ServeSamplerJob) -> dict[str, Any]:
    """Check port and files, serve, wait for SIGINT or SIGTERM, which end it in order.

    With `update`, only change what another process serves.
    """
    if job.update:
        return {"url": deployment.update(job), "updated": True}
    deployment.check_port(job)
    Access(job.access)  # keys and policies that cannot be had are said before anything is started
    checked = checked_files(job)
    settings = {"model_name": job.model_name, "limits": asdict(job.limits)}
    with (
        tracking.open_run(
            job.tracking,
            stage=STAGE,
            settings=settings,
            tags=run_tags(checked.digests, {"prior": checked.files.prior.parent}),
            directory=job.output,
            uri=runtime.tracking_uri(),
        ),
        deployment.serve_in_background(job) as url,
    ):
        started, with_keys = time.monotonic(), job.access.keys is not None
        with _until_told_to_stop() as told:
            print(f"serving {job.model_name} at {url}; Ctrl-C ends it. Try:", flush=True)
            print(deployment.curl_line(url, EXAMPLE, with_key=with_keys), flush=True)
            print(f"or open {url}/ in a browser. {KEYS[with_keys]}", flush=True)
            told.wait()
        served = time.monotonic() - started
        print("stopping …", flush=True)
    return {"url": url, "served_seconds": round(served, 1)}


@contextmanager
def _until_told_to_stop() -> Iterator[threading.Event]:
    """Set by SIGINT and SIGTERM; installed late, because Ray installs handlers of its own."""
    told = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: told.set()) for number in signals}
    try:
        yield told
    finally:
        # A second Ctrl-C must not interrupt the clean-up that follows.
        signal.signal(signal.SIGTERM, before[signal.SIGTERM])
        signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
