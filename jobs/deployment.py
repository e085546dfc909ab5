"""Hosting the sampler on Ray Serve; used by jobs.serve_sampler and jobs.quickstart."""

import errno
import io
import json
import logging
import shlex
import socket
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from jobs.configs.serve_sampler import ServeSamplerJob
from jobs.ray_session import ray_session
from jobs.replicas import trial
from jobs.serving_application import application, checked_files, sampler_settings
from pipelines.data.storage import canonical_json, replace_file
from pipelines.sampling.loading import CheckedFiles

APP = "manray"
RECORD = "serving.json"
# Beyond the app's own limits, so that it is the app that answers, in OpenAI's envelope.
SPARE_SECONDS = 15.0
TRIAL_SECONDS = 600.0


@contextmanager
def serve_in_background(job: ServeSamplerJob) -> Iterator[str]:
    """Serve within the block; gives the base URL once it answers.

    Whatever is wrong with the port or the files is said before Ray is started.
    """
    check_port(job)
    checked = checked_files(job)
    with ray_session():
        from ray import serve

        _quiet()
        serve.start(
            proxy_location="Disabled" if job.listen == "ingress" else "HeadOnly",
            http_options={
                "host": job.host,
                "port": job.port,
                "request_timeout_s": job.limits.deadline_seconds + SPARE_SECONDS,
            },
        )
        if APP in serve.status().applications:
            raise ValueError(
                f"a cluster must serve one {APP}, and this one does already: end that one first, "
                "or replace what it serves with --update"
            )
        try:
            _run(job, checked)
            url = base_url(job)
            _check_it_is_ours(job, url)
            replace_file(job.output / RECORD, canonical_json(_record(job, checked, url)))
            yield url
        finally:
            serve.delete(APP)
            if not serve.status().applications:  # on a shared cluster there may be others
                # Ray 2.60 prints that Serve's controller, which it ended itself, is dead.
                with redirect_stdout(io.StringIO()):
                    serve.shutdown()
                _wait_until_free(job)


def update(job: ServeSamplerJob) -> str:
    """Let the server of this cluster go on with other files; gives its URL.

    A picture is drawn from them first: if that fails, or a replica does not start, the old ones
    stay. Replicas with the new files start before those with the old ones end, which let their
    requests end.
    """
    checked = checked_files(job)
    with ray_session():
        import ray
        from ray import serve

        _quiet()
        if APP not in serve.status().applications:
            raise ValueError(
                "RAY_ADDRESS must name a cluster that serves already, and this one does not: "
                "leave --update out"
            )
        settings, scale = sampler_settings(job, checked), job.samplers
        once = ray.remote(num_cpus=scale.cpus, num_gpus=scale.gpus, max_retries=0)(trial)
        try:
            ray.get(once.remote(settings), timeout=TRIAL_SECONDS)
        except ray.exceptions.GetTimeoutError:
            raise RuntimeError(
                f"a sampler must start within {TRIAL_SECONDS:g} s for a trial, but it did not: an "
                f"update needs {scale.cpus} free CPUs and {scale.gpus:g} free GPUs"
            ) from None
        _run(job, checked)
        url = base_url(job)
        replace_file(job.output / RECORD, canonical_json(_record(job, checked, url)))
    return url


def check_port(job: ServeSamplerJob) -> None:
    """Refuse a port that somebody listens on; Serve would go on trying for a minute."""
    family = socket.AF_INET6 if ":" in job.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((job.host, job.port))
        except OSError as error:
            reason = "is taken" if error.errno == errno.EADDRINUSE else "cannot be listened on"
            raise ValueError(
                f"port must be free, but {job.host}:{job.port} {reason} ({error.strerror}): "
                "choose another with --port"
            ) from error


def _wait_until_free(job: ServeSamplerJob) -> None:
    """Serve's processes end a moment after it says so: who serves next must find the port free."""
    deadline = time.monotonic() + SPARE_SECONDS
    while time.monotonic() < deadline:
        try:
            check_port(job)
        except ValueError:
            time.sleep(0.1)
        else:
            return


def base_url(job: ServeSamplerJob) -> str:
    """Where a client on this machine finds the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(job.host, job.host)  # noqa: S104
    return f"http://{host}:{job.port}"


def curl_line(url: str, prompt: str, *, with_key: bool = False) -> str:
    """A command that asks the server for a picture."""
    key = '-H "Authorization: Bearer $MANRAY_KEY" ' if with_key else ""
    body = shlex.quote(json.dumps({"prompt": prompt, "n": 1, "seed": 0}, ensure_ascii=False))
    return f"curl {url}/v1/images/generations {key}-H 'Content-Type: application/json' -d {body}"


def _run(job: ServeSamplerJob, checked: CheckedFiles) -> None:
    from ray import serve

    try:
        serve.run(application(job, checked), name=APP, route_prefix="/")
    except RuntimeError as error:  # it says that a deployment failed, not why
        deployments = serve.status().applications[APP].deployments.values()
        # The last line of the replica's traceback; the rest is in Serve's logs.
        reasons = [deployment.message.strip().rpartition("\n")[2] for deployment in deployments]
        said = "; ".join(filter(None, reasons))
        raise RuntimeError(f"{job.prior} could not be served: {said}") from error


def _check_it_is_ours(job: ServeSamplerJob, url: str) -> None:
    """A Serve that ran before keeps its own port: then this one would not answer."""
    deadline = time.monotonic() + SPARE_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"{url}/healthz", timeout=5) as answer:  # noqa: S310
                found = json.load(answer)["model"]
            break
        except (OSError, ValueError) as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{url} must answer, but: {error}") from error
            time.sleep(0.2)
    if found != job.model_name:
        raise RuntimeError(f"{url} must serve {job.model_name}, but it serves {found}")


def _record(job: ServeSamplerJob, checked: CheckedFiles, url: str) -> dict[str, Any]:
    return {"url": url, "model": job.model_name, "digests": checked.digests}


def _quiet() -> None:
    """Serve tells of each of its actors."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
