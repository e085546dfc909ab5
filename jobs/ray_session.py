"""The Ray that a job works on: the cluster's, or a private one of this machine."""

import logging
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOR_EVERY_JOB = 4  # logical processors
OBJECT_STORE_BYTES = 256 * 1024 * 1024
CHANCES = 3  # of a Ray to start

# State of this process: whether it started Ray, and whether jobs share it.
_ray_is_ours: list[bool] = []
_sharing: list[bool] = []


@contextmanager
def ray_session(num_cpus: int = FOR_EVERY_JOB) -> Iterator[None]:
    """Use the Ray that runs (this process's, or RAY_ADDRESS's), else a private one on this machine.

    `num_cpus` is the least number of logical processors of the private one: a pipeline's stages
    hold one each, and with fewer than four of them a two-worker training or a streaming read can
    wait for itself for ever. Jobs that share one get four.
    """
    import ray

    if not ray.is_initialized():
        _start(max(num_cpus, FOR_EVERY_JOB) if _sharing else num_cpus)
        _ray_is_ours.append(True)
    elif not _ray_is_ours:  # a test's, say: its owner ends it
        yield
        return
    try:
        yield
    finally:
        if not _sharing:
            _ray_is_ours.clear()
            ray.shutdown()


@contextmanager
def shared_ray() -> Iterator[None]:
    """Within it, the first `ray_session` starts Ray and the later ones use the same."""
    _sharing.append(True)
    try:
        yield
    finally:
        _sharing.clear()
        if _ray_is_ours:
            import ray

            _ray_is_ours.clear()
            ray.shutdown()


def start_local_ray(num_cpus: int, object_store_bytes: int = OBJECT_STORE_BYTES) -> None:
    """A private Ray of this machine, whose processes end with this one.

    Starting takes some eight seconds of processor time, and Ray 2.60 gives itself half a minute for
    it whatever else the machine has to do: it gets more than one chance.
    """
    import ray

    _make_private_token()
    for left in reversed(range(CHANCES)):
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                object_store_memory=object_store_bytes,
                include_dashboard=False,
                logging_level=logging.WARNING,
                log_to_driver=False,
                _temp_dir=_temporary_directory(),
            )
            return
        except Exception as error:  # Ray has no class for it
            if not left or "timed out during startup" not in str(error):
                raise
            print("Ray did not start within its 30 seconds; it is started anew", file=sys.stderr)
            _end_what_has_started(error)


def _start(num_cpus: int) -> None:
    import ray

    if os.environ.get("RAY_ADDRESS", "local") != "local":
        ray.init(logging_level=logging.WARNING)
    else:
        start_local_ray(max(num_cpus, os.cpu_count() or 1))


def _end_what_has_started(error: Exception) -> None:
    """Else half a Ray would stay until this process ends; only the failed call still knows it."""
    from ray._private.node import Node

    call = error.__traceback__
    while call is not None:
        if isinstance(node := call.tb_frame.f_locals.get("self"), Node):
            node.kill_all_processes(check_alive=False, wait=True)
            return
        call = call.tb_next


def _make_private_token() -> None:
    """Ray 2.60 would make the token itself, readable by everybody on the machine."""
    default = Path.home() / ".ray" / "auth_token"
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or default)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))


def _temporary_directory() -> str:
    """A short path: Ray puts unix sockets below it, whose names may have 107 characters."""
    return os.environ.get("RAY_TMPDIR") or str(
        Path(tempfile.gettempdir()) / f"manray-{os.getuid()}"
    )
