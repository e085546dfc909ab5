"""What every job does the same way: parse, say, end with a code.

Exit codes: 0 done (or nothing to do), 1 failed, 2 refused (a flag, a preset or an input is wrong
and nothing was written), 75 stopped by SIGTERM after a checkpoint, 130 interrupted (run the same
line again to go on, after both).
"""

import difflib
import errno
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from pipelines.data.collapse import NetworkCollapsed
from pipelines.data.storage import Location, NoSpace, canonical_json, refuse_secrets
from pipelines.training.stopping import Stopped

if TYPE_CHECKING:
    from jobs.configs.job import Job

# These libraries phone home, or print a page, unless they are told not to.
QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
}
# A dead MLflow server must cost seconds, not its default of seven retries of two minutes each.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota, a limit of the process
STOPPED = 75  # sysexits.h: try again later

Body = Callable[[Any], dict[str, Any]]
Plan = Callable[[Any], list[str]]


def run_job(
    verb: str,
    presets: Mapping[str, tuple[str, "Job"]],
    body: Body,
    argv: Sequence[str] | None,
    plan: Plan,
) -> int:
    """Parse the arguments, run the job, print its summary as one JSON line, return the exit code.

    `plan` gives the lines that ``--dry-run`` prints below the config. ValueError and
    FileNotFoundError are the user's to mend and exit with 2; everything else is a failure and exits
    with 1.
    """
    set_environment()
    job = parse(verb, presets, sys.argv[1:] if argv is None else list(argv))
    if isinstance(job, int):
        return job
    try:
        refuse_secrets("the config", _plain(asdict(job)))
        if job.dry_run:
            print(canonical_json(_plain(asdict(job))).decode(), end="")
            print("\n".join(plan(job)))
            return 0
        started = time.monotonic()
        summary: dict[str, Any] = {"job": verb} | body(job)
        summary.setdefault("seconds", round(time.monotonic() - started, 1))
        print(json.dumps(_plain(summary)), flush=True)
        return 0
    except SystemExit as end:  # a job within this job has said what is wrong
        return int(end.code or 0)
    except Stopped:
        print(f"{verb}: stopped after a checkpoint; run the same line again to go on")
        return STOPPED
    except KeyboardInterrupt:
        print(f"{verb}: interrupted; run the same line again to go on", file=sys.stderr)
        return 130
    except Exception as error:
        return _say(verb, error)


def run_look(
    verb: str, config: type[Any], body: Callable[[Any], int], argv: Sequence[str] | None
) -> int:
    """Parse the arguments and look at datasets, which needs neither presets nor Ray.

    `body` prints and gives the exit code. What a user can mend exits with 2, a store that is away
    with 1.
    """
    set_environment()
    try:
        return body(tyro.cli(config, args=argv, prog=f"python -m jobs.{verb}"))
    except (ValueError, FileNotFoundError) as error:
        print(f"{verb}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{verb}: failed: {error}", file=sys.stderr)
        return 1


def parse(verb: str, presets: Mapping[str, tuple[str, "Job"]], argv: list[str]) -> Any:
    """The job's config, or an exit code if the arguments ask for help or are wrong."""
    if argv and not argv[0].startswith("-") and argv[0] not in presets:
        near = difflib.get_close_matches(argv[0], presets, n=3, cutoff=0.4) or list(presets)
        print(
            f"{verb}: the preset must be one of {', '.join(presets)}, got {argv[0]!r}; "
            f"did you mean {' or '.join(near)}?",
            file=sys.stderr,
        )
        return 2
    try:
        return tyro.extras.overridable_config_cli(
            dict(presets), args=argv, prog=f"python -m jobs.{verb}"
        )
    except SystemExit as end:
        return int(end.code or 0)
    except ValueError as error:  # a config that refuses its own values
        print(f"{verb}: {error}", file=sys.stderr)
        return 2


def set_environment() -> None:
    """Defaults that a user's own environment overrides."""
    for name, value in (QUIET_ENVIRONMENT | PATIENCE).items():
        os.environ.setdefault(name, value)
    if os.environ.get("RAY_ADDRESS", "local") == "local":
        # Ray reads it when it is imported, so it is too late where Ray is started.
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or the SQLite file under runs/ of the current directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('runs/mlflow.db').resolve()}"


def nothing_to_do(what: Path | Location) -> None:
    """Say that a job found its output whole."""
    print(f"nothing to do: {what} is there and was made with these settings", flush=True)


def _say(verb: str, error: BaseException) -> int:
    """Print what went wrong in the user's words; the exit code."""
    cause = _root_cause(error)
    if isinstance(cause, (ValueError, FileNotFoundError, NotADirectoryError)):
        print(f"{verb}: {cause}", file=sys.stderr)
        return 2
    if isinstance(cause, NetworkCollapsed):
        print(f"{verb}: {cause}", file=sys.stderr)
        return 1
    if isinstance(cause, OSError) and cause.errno in FULL:
        if isinstance(cause, NoSpace):
            print(f"{verb}: {cause.strerror}", file=sys.stderr)
            return 1
        place = f" ({cause.filename})" if cause.filename else ""
        print(
            f"{verb}: the disk is full{place}; nothing that was committed is harmed: "
            "make space and run the same line again",
            file=sys.stderr,
        )
        return 1
    if isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE:
        print(f"{verb}: the port is taken: {cause}; choose another --port", file=sys.stderr)
        return 2
    traceback.print_exception(error)
    print(f"{verb}: failed: {type(cause).__name__}: {cause}", file=sys.stderr)
    return 1


def _root_cause(error: BaseException) -> BaseException:
    """The error that a worker met, out of the wrappers that Ray puts around it."""
    seen = {id(error)}
    while True:
        inner = getattr(error, "cause", None)
        failures = getattr(error, "worker_failures", None)  # Ray Train: one error a rank
        if not isinstance(inner, BaseException) and isinstance(failures, dict) and failures:
            inner = next(iter(failures.values()))
        if not isinstance(inner, BaseException) and _is_wrapper(error):
            inner = error.__cause__
        if not isinstance(inner, BaseException) or id(inner) in seen:
            return error
        seen.add(id(inner))
        error = inner


def _is_wrapper(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] == "ray"


def _plain(value: Any) -> Any:
    """Values as JSON knows them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (Path, Location)):
        return str(value)
    return value
