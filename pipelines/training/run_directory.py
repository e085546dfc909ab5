"""What a training leaves beside its model: `result.json`, and the tags that join the stages."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.data.storage import Location, canonical_json, replace_file
from pipelines.training.mlflow_run import run_id_of

RESULT = "result.json"


def write_result(output: Path, result: Mapping[str, Any]) -> None:
    """Keep a training's last figures; written before the model file, which means "finished"."""
    replace_file(output / RESULT, canonical_json(dict(result)))


def read_result(output: Path) -> dict[str, Any]:
    file = output / RESULT
    return dict(json.loads(file.read_bytes())) if file.exists() else {}


def run_tags(digests: Mapping[str, str], parents: Mapping[str, Path | Location]) -> dict[str, str]:
    """MLflow tags: the code's git commit, the inputs' digests, the runs that made the inputs.

    `parents` maps an input's name to the output directory of the stage that made it.
    """
    tags = {"git_sha": git_sha()}
    tags |= {f"{name}_digest": digest for name, digest in digests.items()}
    tags |= {f"parent.{name}": run_id_of(directory) for name, directory in parents.items()}
    return {name: value for name, value in tags.items() if value}


def git_sha() -> str:
    """The commit of the running code; empty outside a git checkout (on a cluster's node)."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
