"""Hosting the sampler on Ray Serve; used by jobs.serve_sampler and jobs.quickstart."""

import dataclasses
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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs import runtime
from jobs.configs.serve_sampler import ServeSamplerJob
from jobs.rate_limits import SharedBudget
from pipelines.data.storage import canonical_json, replace_file
from pipelines.sampling.access import Access, AccessSettings, hosts_for
from pipelines.sampling.api import ServedModel
from pipelines.sampling.http_app import build_app
from pipelines.sampling.loading import (
    CheckedFiles,
    DeviceChoice,
    ModelFiles,
    check_files,
    load_sampler,
)
from pipelines.sampling.local_pictures import LocalPictures, ServingLimits
from pipelines.sampling.model_card import model_card
from pipelines.training.tracking import run_id_of
from pipelines.training.weights import read_header

if TYPE_CHECKING:
    from fastapi import FastAPI

APP = "manray"
RECORD = "serving.json"
# Beyond the app's own limits, so that it is the app that answers, in OpenAI's envelope.
SPARE_SECONDS = 15.0
SPARE_REQUESTS = 16


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """What a replica needs to know; travels to it."""

    files: ModelFiles
    model_name: str
    created: int
    device: DeviceChoice
    threads: int
    max_candidates: int
    limits: ServingLimits
    access: AccessSettings
    guidable: bool
    about: dict[str, str]


class SamplerService:
    """One replica: loads the models, makes a picture to see that they work, hosts the app."""

    def __init__(self, settings: ServiceSettings) -> None:
        import torch

        torch.set_num_threads(settings.threads)
        sampler = load_sampler(
            settings.files, device=settings.device, max_candidates=settings.max_candidates
        )
        sampler.generate("warm up")
        model = ServedModel(
            name=settings.model_name,
            created=settings.created,
            image_size=sampler.image_size,
            image_tokens=sampler.prior.config.image_len,
            vocab_size=sampler.prior.config.image_vocab_size,
            check_prompt=sampler.check_prompt,
            first_rows=sampler.first_rows,
            guidable=settings.guidable,
            about=settings.about,
        )
        self._app = build_app(
            LocalPictures(sampler, settings.limits),
            model,
            Access(settings.access, SharedBudget(settings.access.rate)),
            host_numbers_requests=True,
        )

    def __serve_build_asgi_app__(self) -> "FastAPI":
        return self._app


@contextmanager
def serve_in_background(job: ServeSamplerJob) -> Iterator[str]:
    """Serve within the block; gives the base URL once it answers.

    Whatever is wrong with the port or the files is said before Ray is started.
    """
    check_port(job)
    checked = check_model_files(job)
    with runtime.ray_session():
        from ray import serve

        _quiet()
        serve.start(
            proxy_location="HeadOnly",
            http_options={
                "host": job.host,
                "port": job.port,
                "request_timeout_s": job.limits.deadline_seconds + SPARE_SECONDS,
            },
        )
        if APP in serve.status().applications:
            raise ValueError(
                f"a cluster must serve one {APP}, and this one does already: end that one first"
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


def check_model_files(job: ServeSamplerJob) -> CheckedFiles:
    """The models' headers and digests, see `loading.check_files`."""
    return check_files(ModelFiles(tokenizer=job.tokenizer, dvae=job.dvae, prior=job.prior))


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
    from ray.serve.config import BackpressureConfig

    settings = ServiceSettings(
        files=checked.files.resolved(),
        model_name=job.model_name,
        created=int(job.prior.stat().st_mtime),
        device=job.device,
        threads=job.cpus_per_replica,
        max_candidates=job.max_candidates,
        limits=job.limits,
        access=_access(job),
        guidable=checked.caption_dropout > 0,
        about=model_card(read_header(job.prior, "prior"), run_id_of(job.prior.parent)),
    )
    # Not decorators: Ray is imported only by those who serve.
    service = serve.deployment(
        serve.ingress()(SamplerService),
        name=APP,
        num_replicas=job.replicas,
        max_ongoing_requests=1 + job.limits.max_waiting + SPARE_REQUESTS,
        max_queued_requests=SPARE_REQUESTS,
        # Models that fail once fail again: by default Serve would load them twenty times.
        max_constructor_retry_count=1,
        backpressure_config=BackpressureConfig(
            status_code=429, retry_after_s=job.limits.retry_after_seconds
        ),
        ray_actor_options={"num_cpus": job.cpus_per_replica, "num_gpus": job.gpus_per_replica},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    try:
        serve.run(service.bind(settings), name=APP, route_prefix="/")
    except RuntimeError as error:  # it says that a deployment failed, not why
        deployments = serve.status().applications[APP].deployments.values()
        # The last line of the replica's traceback; the rest is in Serve's logs.
        reasons = [deployment.message.strip().rpartition("\n")[2] for deployment in deployments]
        raise RuntimeError(f"{job.prior} could not be served: {'; '.join(reasons)}") from error


def _access(job: ServeSamplerJob) -> AccessSettings:
    """The job's, as a replica elsewhere needs it."""
    keys = job.access.keys
    return dataclasses.replace(
        job.access,
        keys=keys and keys.resolve(),
        hosts=hosts_for(job.host, job.access.hosts),
    )


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
