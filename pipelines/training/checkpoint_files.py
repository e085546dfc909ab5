"""What a checkpoint's directory holds, and how it is told from one that is not whole.

The shards of torch.distributed.checkpoint, `progress.json`, and `COMPLETE`, written last, with
every file's size and SHA-256.
"""

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipelines.data.storage import canonical_json, create_once, sha256_file
from pipelines.training.hashed_files import Written

COMPLETE = "COMPLETE"
PROGRESS = "progress.json"


def attempts(root: Path) -> list[Path]:
    """Directories of checkpoints, whole or not, the newest first."""
    return sorted(root.glob("step-*"), reverse=True) if root.exists() else []


def is_complete(path: Path) -> bool:
    return (path / COMPLETE).exists()


def write_progress(path: Path, content: bytes) -> dict[str, Written]:
    """Bring what is no tensor to the disk; what was written, by name."""
    create_once(path / PROGRESS, content)
    return {PROGRESS: Written(len(content), hashlib.sha256(content).hexdigest())}


def complete(path: Path, step: int, files: dict[str, Written]) -> None:
    """Declare a checkpoint whole, whose files are on the disk."""
    listed = {name: written._asdict() for name, written in files.items()}
    create_once(path / COMPLETE, canonical_json({"step": step, "files": listed}))


def listed_files(path: Path) -> tuple[str | None, dict[str, Written]]:
    """What is wrong with a checkpoint at first sight, None if nothing is; and its files."""
    if not is_complete(path):
        return "it was not finished", {}
    try:
        content = (path / COMPLETE).read_bytes()
        listing = json.loads(content)
        files = {name: Written(**entry) for name, entry in listing["files"].items()}
        # One spelling only: a changed byte that leaves it JSON is found, too.
        if canonical_json(listing) != content or not path.name.startswith(_name(listing["step"])):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{COMPLETE} has changed since it was written", {}
    for name, wanted in files.items():
        file = path / name
        if not file.exists():
            return f"{name} is missing", {}
        if file.stat().st_size != wanted.bytes:
            return f"{name} must have {wanted.bytes} bytes, has {file.stat().st_size}", {}
    return None, files


def changed_file(path: Path, files: dict[str, Written]) -> str | None:
    """What is wrong with the contents of some of a checkpoint's files; None if nothing is."""
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(sha256_file, [path / name for name in files]))
    for digest, (name, wanted) in zip(found, files.items(), strict=True):
        if digest != wanted.sha256:
            return f"{name} has changed since it was written"
    return None


def remove_old(root: Path, newest: Path, keep: int, refused: set[str]) -> None:
    """Remove all but the `keep` newest, `newest` among them, which is whole.

    What was refused, and what was left half written, counts for nothing and goes, too.
    """
    old = [path for path in attempts(root) if path != newest]
    whole = [path for path in old if is_complete(path) and path.name not in refused]
    for path in sorted(set(old) - set(whole[: keep - 1])):
        (path / COMPLETE).unlink(missing_ok=True)  # first: half removed, it must not look whole
        shutil.rmtree(path)


def read_progress(path: Path) -> dict[str, Any]:
    progress: dict[str, Any] = json.loads((path / PROGRESS).read_bytes())
    return progress


def directory_name(step: int, token: str) -> str:
    """Of its own for every attempt, so that nothing is ever written into an older one."""
    return f"{_name(step)}{token}"


def _name(step: int) -> str:
    return f"step-{step:08d}."
