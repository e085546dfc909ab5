"""The cluster way, as infra/README.md says it: a Ray head with a token, and `ray job submit`."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.fixtures.datasets import TinyTokens, tiny_tokens
from tests.fixtures.ray_head import RayHead, ray_head, status_of

# The tiny preset's model is minutes of work; this is the same job, two updates of a smaller one.
SMALL = {
    "prior.n-layers": 2,
    "prior.n-heads": 2,
    "prior.d-model": 32,
    "prior.text-vocab-size": 512,
    "training.steps": 2,
    "training.batch-samples": 8,
    "cadence.log-every": 1,
    "cadence.sample-every": 2,
}


@pytest.fixture(scope="module")
def head(private_directory: Path) -> Iterator[RayHead]:
    with ray_head(private_directory / "h", num_cpus=4) as head:
        yield head


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TinyTokens:
    return tiny_tokens(tmp_path_factory.mktemp("made"), rows=32)


def flags(made: TinyTokens, output: Path) -> list[str]:
    """Absolute paths: a submitted job runs in a copy of the code that is deleted after it."""
    paths: dict[str, object] = {
        "tokens": made.tokens,
        "tokenizer": made.tokenizer,
        "dvae": made.dvae,
        "output": output,
    }
    return [part for key, value in (paths | SMALL).items() for part in (f"--{key}", str(value))]


def test_without_the_token_nobody_is_let_in(head: RayHead) -> None:
    token = Path(head.environment["RAY_AUTH_TOKEN_PATH"])
    assert token.stat().st_mode & 0o777 == 0o600
    assert status_of(f"{head.api}/api/jobs/") == 401
    assert status_of(f"{head.api}/api/jobs/", "0" * 64) in (401, 403)
    assert status_of(f"{head.api}/api/jobs/", token.read_text()) == 200


@pytest.mark.slow
def test_a_submitted_training_ends_with_code_0_its_model_and_its_mlflow_run(
    head: RayHead, made: TinyTokens, tmp_path: Path
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    variables = json.dumps({"env_vars": {"MLFLOW_TRACKING_URI": uri}})
    done = head.submit(
        *("python", "-m", "jobs.train_prior", "tiny", *flags(made, tmp_path / "prior")),
        options=("--runtime-env-json", variables),
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert '"job": "train_prior"' in done.stdout
    assert (tmp_path / "prior" / "prior.safetensors").exists()
    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.info.status == "FINISHED"


def test_a_submitted_job_that_is_refused_ends_with_another_code(
    head: RayHead, made: TinyTokens, tmp_path: Path
) -> None:
    output = tmp_path / "prior"
    arguments = flags(made, output)
    done = head.submit("python", "-m", "jobs.train_prior", "tiny", *arguments, "--stepps", "3")
    assert done.returncode != 0
    assert "--stepps" in done.stdout
    assert "exit code 2" in done.stdout
    assert not output.exists()


def test_only_the_code_and_the_corpus_are_uploaded(head: RayHead) -> None:
    """Runs after the jobs above: looks at the copy that the cluster made of the repository."""
    if not list(head.temporary.rglob("_ray_pkg_*/pyproject.toml")):
        assert head.submit("python", "-c", "'pass'").returncode == 0
    for project in head.temporary.rglob("_ray_pkg_*/pyproject.toml"):
        names = {entry.name for entry in project.parent.iterdir()}
        assert {"jobs", "models", "pipelines"} <= names
        assert not {".git", ".venv", "runs", "tests", "docs"} & names
        size = sum(file.stat().st_size for file in project.parent.rglob("*"))
        assert size < 20_000_000  # 10 of them are the corpus
