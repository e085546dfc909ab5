"""The server as one Ray Serve application: which deployments there are, and what each may do.

`serve deploy infra/serve.yaml` builds the same application with `from_config`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tyro

from jobs import runtime
from jobs.configs.serve_sampler import PRESETS, Scale, ServeSamplerJob
from jobs.configs.train_prior import PRESETS as PRIOR_PRESETS
from jobs.ingress import Ingress, IngressSettings, ListeningIngress
from jobs.replicas import RerankerReplica, SamplerReplica, SamplerSettings
from pipelines.sampling.access import AccessSettings, hosts_for
from pipelines.sampling.loading import CheckedFiles, ModelFiles, check_files
from pipelines.sampling.model_card import model_card
from pipelines.training import model_registry
from pipelines.training.mlflow_run import run_id_of
from pipelines.training.weights import read_header

# The app refuses before Serve does, and in OpenAI's envelope: beyond its own bound there is room.
SPARE_REQUESTS = 256
SECONDS_TO_DRAIN = 5.0
SECONDS_TO_BE_HEARD = 2.0
FETCHED = "registry"  # directory of registered models, below the job's output
HEALTH_SECONDS = 1.0  # a replica that died is noticed, and replaced, after as much


def from_config(arguments: Mapping[str, Any]) -> Any:
    """What `args` of a Serve config file describe: a preset, and flags of jobs.serve_sampler.

    For example ``{"preset": "12b", "flags": ["--prior", "/shared/prior.safetensors"]}``.
    """
    unknown = sorted(set(arguments) - {"preset", "flags"})
    if unknown or arguments.get("preset") not in PRESETS:
        raise ValueError(
            f"args must have a preset, one of {sorted(PRESETS)}, and may have flags; "
            f"got {dict(arguments)}"
        )
    _, job = PRESETS[arguments["preset"]]
    flags = [str(flag) for flag in arguments.get("flags", ())]
    job = tyro.cli(ServeSamplerJob, default=job, args=flags)
    return application(job, checked_files(job))


def checked_files(job: ServeSamplerJob) -> CheckedFiles:
    """The models' headers and digests, see `loading.check_files`; fetches a registered model."""
    if job.clip is not None:
        read_header(job.clip, "clip")
    if not model_registry.is_address(job.prior):
        return check_files(ModelFiles(tokenizer=job.tokenizer, dvae=job.dvae, prior=job.prior))
    directory = job.output / FETCHED
    paths, digests = model_registry.fetch(runtime.tracking_uri(), job.prior, directory)
    checked = check_files(ModelFiles(**paths))
    if checked.digests != digests:
        raise ValueError(
            f"the files of {job.prior} must be those that were registered, got {checked.digests} "
            f"instead of {digests}: remove {directory} to fetch them again"
        )
    return checked


def application(job: ServeSamplerJob, checked: CheckedFiles) -> Any:
    """The bound application of a job."""
    from ray import serve

    # Not decorators: Ray is imported only by those who serve.
    samplers = _deployed(job, SamplerReplica, "sampler", job.samplers).bind(
        sampler_settings(job, checked)
    )
    reranker = None
    if job.clip is not None:
        reranker = _deployed(job, RerankerReplica, "reranker", job.rerankers).bind(
            job.clip.resolve(),
            checked.files.tokenizer.resolve(),
            job.device,
            max(1, job.rerankers.cpus),
        )
    listens = job.listen == "ingress"
    kind = ListeningIngress if listens else serve.ingress()(Ingress)
    ingress = _deployed(job, kind, "ingress", job.ingress)
    return ingress.bind(_ingress_settings(job, checked), samplers, reranker)


def sampler_settings(job: ServeSamplerJob, checked: CheckedFiles) -> SamplerSettings:
    """What a sampler of the job is made of."""
    return SamplerSettings(
        files=checked.files.resolved(),
        digests=checked.digests,
        device=job.device,
        threads=max(1, job.samplers.cpus),
        slots=job.slots,
        precision=job.precision,
    )


def _deployed(job: ServeSamplerJob, what: Any, name: str, scale: Scale) -> Any:
    from ray import serve

    bound = job.samplers.most * job.slots + job.limits.max_waiting + SPARE_REQUESTS
    count: dict[str, Any] = {"num_replicas": scale.replicas}
    if scale.most_replicas:
        count = {
            "autoscaling_config": {
                "min_replicas": scale.replicas,
                "max_replicas": scale.most_replicas,
                "target_ongoing_requests": job.slots,
            }
        }
    return serve.deployment(
        what,
        name=name,
        **count,
        max_ongoing_requests=bound,
        max_queued_requests=bound,
        # Models that fail once fail again: by default Serve would load them twenty times.
        max_constructor_retry_count=1,
        # New replicas before old ones end, which may finish what they have.
        max_surge_percent=100,
        graceful_shutdown_timeout_s=job.limits.deadline_seconds + SECONDS_TO_DRAIN,
        # Whoever has not heard yet that a replica is about to end may send it something meanwhile.
        graceful_shutdown_wait_loop_s=SECONDS_TO_BE_HEARD,
        health_check_period_s=HEALTH_SECONDS,
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )


def _ingress_settings(job: ServeSamplerJob, checked: CheckedFiles) -> IngressSettings:
    prior, files = checked.prior, checked.files
    model = {
        "name": job.model_name,
        "created": int(files.prior.stat().st_mtime),
        "image_size": checked.dvae.image_size,
        "image_tokens": prior.image_len,
        "vocab_size": prior.image_vocab_size,
        "guidable": checked.caption_dropout > 0,
        "about": _about(files, checked),
    }
    return IngressSettings(
        model=model,
        prompt_limit=prior.text_len - 1,
        files=checked.files.resolved(),
        samplers=max(1, job.samplers.most // job.ingress.most),
        slots=job.slots,
        limits=job.limits,
        access=_access(job),
        address=(job.host, job.port) if job.listen == "ingress" else None,
    )


def _about(files: ModelFiles, checked: CheckedFiles) -> dict[str, str]:
    """The model's card; a preset is known by the sizes of its prior."""
    presets = [name for name, (_, made) in PRIOR_PRESETS.items() if made.prior == checked.prior]
    header, run_id = read_header(files.prior, "prior"), run_id_of(files.prior.parent)
    return model_card(header, run_id, presets[0] if len(presets) == 1 else "")


def _access(job: ServeSamplerJob) -> AccessSettings:
    """The job's, as a replica elsewhere needs it."""
    keys: Path | None = job.access.keys
    return dataclasses.replace(
        job.access,
        keys=keys and keys.resolve(),
        hosts=hosts_for(job.host, job.access.hosts),
    )
