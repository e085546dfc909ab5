"""Checkpoints that are whole or not there: what a training resumes from.

A checkpoint is a directory of its own: the shards of torch.distributed.checkpoint, `progress.json`,
and `COMPLETE`, written last, with every file's size and SHA-256. It can be read by any number of
ranks.
"""

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from pipelines.data.storage import canonical_json, create_once, sha256_file

COMPLETE = "COMPLETE"
PROGRESS = "progress.json"


def save(
    root: Path, step: int, state: dict[str, Any], progress: Mapping[str, Any], keep: int
) -> None:
    """Save `state` (tensors) and `progress` (JSON) after update `step`; called by every rank.

    All but the `keep` newest complete checkpoints are removed, after this one is complete.
    """
    path = root / _agree(f"step-{step:08d}.{uuid.uuid4().hex[:8]}")
    path.mkdir(parents=True, exist_ok=True)
    dcp.save(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    if _rank() == 0:
        create_once(path / PROGRESS, canonical_json({"step": step} | dict(progress)))
    files = _hash_own_files(path)
    if _rank() == 0:
        create_once(path / COMPLETE, canonical_json({"step": step, "files": files}))
        _remove_old(root, keep)
    _barrier()


def newest_valid(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every file is as written, and why newer ones were refused."""
    found: tuple[str | None, list[str]] | None = None
    if _rank() == 0:
        found = _search(root)
    path, rejected = _agree(found)
    return (None if path is None else Path(path)), rejected


def load(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Fill `state` in place from a checkpoint; the progress it was saved with."""
    dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    progress: dict[str, Any] = json.loads((path / PROGRESS).read_bytes())
    return progress


def _search(root: Path) -> tuple[str | None, list[str]]:
    rejected: list[str] = []
    for path in sorted(_attempts(root), reverse=True):
        problem = _problem(path)
        if problem is None:
            return str(path), rejected
        rejected.append(f"{path.name}: {problem}")
    return None, rejected


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
    if not (path / COMPLETE).exists():
        return "it was not finished"
    try:
        files = json.loads((path / COMPLETE).read_bytes())["files"]
    except (ValueError, KeyError):
        return f"{COMPLETE} is not readable"
    for name, wanted in files.items():
        file = path / name
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size != wanted["bytes"]:
            return f"{name} must have {wanted['bytes']} bytes, has {file.stat().st_size}"
        if sha256_file(file) != wanted["sha256"]:
            return f"{name} has changed since it was written"
    return None


def _hash_own_files(path: Path) -> dict[str, dict[str, Any]]:
    """Sizes and hashes of the checkpoint's files; each rank reads what it wrote."""
    own = [file for file in path.iterdir() if file.name.startswith(f"__{_rank()}_")]
    if _rank() == 0:
        own += [path / ".metadata", path / PROGRESS]
    mine = {file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)} for file in own}
    if not dist.is_initialized():
        return mine
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {name: entry for files in everyone for name, entry in files.items()}


def _remove_old(root: Path, keep: int) -> None:
    complete = [path for path in _attempts(root) if (path / COMPLETE).exists()]
    for path in sorted(complete)[:-keep]:
        (path / COMPLETE).unlink()  # first: a half-removed checkpoint must not look whole
        shutil.rmtree(path)


def _attempts(root: Path) -> list[Path]:
    return list(root.glob("step-*")) if root.exists() else []


def _agree(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=_object_device())
    return box[0]


def _object_device() -> torch.device:
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
