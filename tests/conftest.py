"""What every test stands on: an environment of its own, and one small Ray for those that need it.

Tests of tests/unit never ask for `ray_cluster`; Ray is not even imported for them. Each of several
processes of pytest (`make test` has two) has all of it for itself.
"""

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from pipelines.data import s3
from tests.fixtures.s3_server import S3Server, running_s3

RAY_CPUS = (
    4  # logical: two workers of a training and the stages of a read must fit beside each other
)
OBJECT_STORE_BYTES = 200 * 1024 * 1024

# Set before any test module imports ray or mlflow, which read some of these when imported.
_PRIVATE = Path(tempfile.mkdtemp(prefix="mr", dir="/tmp"))  # short: Ray's sockets lie below it
os.environ |= {
    "RAY_ADDRESS": "local",  # never join a cluster that happens to run here
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN_PATH": str(_PRIVATE / "auth_token"),
    "RAY_TMPDIR": str(_PRIVATE / "ray"),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "3600",  # nobody reads what Ray's log monitor would collect
    "MLFLOW_TRACKING_URI": f"sqlite:///{_PRIVATE}/mlflow.db",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    # Two cores, and several processes at once: more threads than this only wait for each other.
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
for _name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "RAY_API_SERVER_ADDRESS", "RAY_JOB_ID"):
    os.environ.pop(_name, None)

_TOKEN = _PRIVATE / "auth_token"
_TOKEN.touch(mode=0o600)
_TOKEN.write_text(os.urandom(32).hex())

# A busy machine is slow, not wrong; and a test that fails must fail again.
hypothesis.settings.register_profile("manray", deadline=None, derandomize=True)
hypothesis.settings.load_profile("manray")


def pytest_unconfigure() -> None:
    shutil.rmtree(_PRIVATE, ignore_errors=True)


@pytest.fixture(scope="session")
def private_directory() -> Path:
    """A directory with a short name that ends with the session."""
    return _PRIVATE


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray of four logical processors, shared by the whole session."""
    import ray

    from jobs.ray_session import start_local_ray

    start_local_ray(RAY_CPUS, OBJECT_STORE_BYTES)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_server(private_directory: Path) -> Iterator[S3Server]:
    """A real S3 server on loopback for the whole session."""
    with running_s3(private_directory / "s3") as server:
        yield server


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a new bucket; this process's S3 client speaks to the session's server."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    name = f"test-{uuid.uuid4().hex[:12]}"
    s3_server.client().create_bucket(Bucket=name)
    s3.client.cache_clear()
    yield name
    s3.client.cache_clear()
