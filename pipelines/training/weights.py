"""A trained model is one safetensors file that holds its own config: nothing is unpickled.

The digest of a model is the SHA-256 of that file.
"""

import dataclasses
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.dvae import DVAE, DVAEConfig
from models.prior import Prior, PriorConfig

# One key: safetensors writes its metadata in no fixed order, and equal models must have equal
# bytes.
METADATA_KEY = "manray"

Config = TypeVar("Config")


def save_model(
    path: Path, *, kind: str, config: Any, state: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write a model whole or not at all; `metadata` is JSON: digests of what it was trained on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"kind": kind, "config": dataclasses.asdict(config), "metadata": dict(metadata)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        save_file(tensors, temporary, {METADATA_KEY: json.dumps(header, sort_keys=True)})
        temporary.chmod(0o644)  # safetensors makes it private; other users serve it
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_dvae(path: Path) -> tuple[DVAE, dict[str, Any]]:
    """A stage-one model in eval mode, and the metadata it was saved with."""
    config, state, metadata = _read(path, "dvae", DVAEConfig)
    model = DVAE(config)
    model.load_state_dict(state, strict=True)
    return model.eval(), metadata


def load_prior(path: Path) -> tuple[Prior, dict[str, Any]]:
    """A prior in eval mode, and the metadata it was saved with."""
    config, state, metadata = _read(path, "prior", PriorConfig)
    with torch.device("meta"):
        model = Prior(config)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval(), metadata


def read_header(path: Path, kind: str) -> dict[str, Any]:
    """The header of a model file: ``kind``, ``config`` and ``metadata``, without its weights.

    Raises ValueError if the file is missing, broken, or another kind of model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise ValueError(f"{path} must be a {kind} model file, but there is none") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be a safetensors file: {error}") from error
    if METADATA_KEY not in metadata:
        raise ValueError(f"{path} must be made by manray, but its header has no {METADATA_KEY!r}")
    header: dict[str, Any] = json.loads(metadata[METADATA_KEY])
    if header["kind"] != kind:
        raise ValueError(f"{path} must hold a {kind}, got a {header['kind']}")
    return header


def _read(
    path: Path, kind: str, config_type: type[Config]
) -> tuple[Config, dict[str, Tensor], dict[str, Any]]:
    header = read_header(path, kind)
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    return config_type(**header["config"]), state, header["metadata"]
