"""Samplers in MLflow's registry: three files that belong together, by name and alias.

A version holds copies of tokenizer, dVAE and prior, and their digests as tags, so that an alias can
be set to another version and back without a file being touched.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from pipelines.data.storage import sha256_file
from pipelines.training import mlflow_run

FILES = {
    "tokenizer": "tokenizer.json",
    "dvae": "dvae.safetensors",
    "prior": "prior.safetensors",
}
# pathlib may have taken a slash of two.
ADDRESS = re.compile(r"models:/+(?P<name>[^/@]+)@(?P<alias>[^/@]+)")


def is_address(path: Path) -> bool:
    """Whether a path is models:/NAME@ALIAS."""
    return ADDRESS.fullmatch(str(path)) is not None


def register(
    uri: str, files: Mapping[str, Path], digests: Mapping[str, str], *, name: str, alias: str
) -> str:
    """Enter files as a new version of a model and let an alias name it; gives the version.

    `files` and `digests` are by the names of `FILES`; `digests` are those of `check_files`. Raises
    whatever MLflow raises.
    """
    client, errors = mlflow_run.client_of(uri), mlflow_run.failures()
    experiment = client.get_experiment_by_name(name)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
    run = client.create_run(experiment_id, run_name=f"register {name}@{alias}")
    for kind, file_name in FILES.items():
        if files[kind].name != file_name:
            raise ValueError(f"{kind} must be a file named {file_name}, got {files[kind]}")
        client.log_artifact(run.info.run_id, str(files[kind]), "sampler")
    client.set_terminated(run.info.run_id)
    try:
        client.get_registered_model(name)
    except errors:
        client.create_registered_model(name)
    version = client.create_model_version(
        name,
        source=f"{run.info.artifact_uri}/sampler",
        run_id=run.info.run_id,
        tags={f"{kind}_digest": digests[kind] for kind in FILES},
    )
    client.set_registered_model_alias(name, alias, version.version)
    return str(version.version)


def fetch(uri: str, address: Path, directory: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The files that an alias names now, copied below `directory`, and their registered digests.

    Each version has a directory of its own; files that are there already are not copied again.
    Raises ValueError if there is no such model, or if its prior or dVAE is not what was registered.
    """
    found = ADDRESS.fullmatch(str(address))
    if found is None:
        raise ValueError(f"a registered model must be models:/NAME@ALIAS, got {address}")
    client, errors = mlflow_run.client_of(uri), mlflow_run.failures()
    try:
        version = client.get_model_version_by_alias(found["name"], found["alias"])
    except errors as error:
        raise ValueError(f"{address} must be in the registry at {uri}, but: {error}") from error
    target = directory / f"{found['name']}-{version.version}"
    target.mkdir(parents=True, exist_ok=True)
    digests = {kind: version.tags[f"{kind}_digest"] for kind in FILES}
    files = {kind: target / "sampler" / file_name for kind, file_name in FILES.items()}
    if not all(file.exists() for file in files.values()):
        client.download_artifacts(version.run_id, "sampler", str(target))
    for kind in ("dvae", "prior"):  # the tokenizer's digest is of its content, see check_files
        if (digest := sha256_file(files[kind])) != digests[kind]:
            raise ValueError(
                f"{files[kind]} must have the digest {digests[kind]} that was registered, got "
                f"{digest}: remove {target} to fetch it again"
            )
    return files, digests
