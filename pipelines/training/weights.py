"""A trained model is one safetensors file that holds its own config: nothing is unpickled.

The digest of a model is the SHA-256 of that file.
"""

import dataclasses
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.dvae import DVAE, DVAEConfig
from models.prior import Prior, PriorConfig
from models.stage_one import StageOne, StageOneConfig
from models.vqvae import VQVAE, VQVAEConfig

# One key: safetensors writes its metadata in no fixed order, and equal models must have equal
# bytes.
METADATA_KEY = "manray"

# Whatever takes a stage-one model takes either.
STAGE_ONE = ("dvae", "vqvae")


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


def load_stage_one(path: Path) -> tuple[StageOne, dict[str, Any]]:
    """A dVAE or a VQ-VAE in eval mode, and the metadata it was saved with."""
    header = read_header(path, *STAGE_ONE)
    with torch.device("meta"):
        model = build_stage_one(stage_one_config(header))
    model.load_state_dict(read_state(path), strict=True, assign=True)
    return model.eval(), header["metadata"]


def stage_one_config(header: Mapping[str, Any]) -> StageOneConfig:
    """The config in the header of a dVAE or a VQ-VAE."""
    config_type = DVAEConfig if header["kind"] == "dvae" else VQVAEConfig
    return config_type(**header["config"])


def stage_one_kind(config: StageOneConfig) -> str:
    """dvae or vqvae: the kind of model that has such a config."""
    return "vqvae" if isinstance(config, VQVAEConfig) else "dvae"


def build_stage_one(config: StageOneConfig) -> StageOne:
    """An untrained model of these sizes."""
    if isinstance(config, VQVAEConfig):
        return VQVAE(config)
    if isinstance(config, DVAEConfig):
        return DVAE(config)
    raise TypeError(f"config must be a DVAEConfig or a VQVAEConfig, got {type(config).__name__}")


def load_prior(path: Path) -> tuple[Prior, dict[str, Any]]:
    """A prior in eval mode, and the metadata it was saved with."""
    header = read_header(path, "prior")
    with torch.device("meta"):
        model = Prior(PriorConfig(**header["config"]))
    model.load_state_dict(read_state(path), strict=True, assign=True)
    return model.eval(), header["metadata"]


def read_header(path: Path, *kinds: str) -> dict[str, Any]:
    """The header of a model file: ``kind``, ``config`` and ``metadata``, without its weights.

    Raises ValueError if the file is missing, broken, or another kind of model.
    """
    wanted = " or ".join(kinds)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise ValueError(f"{path} must be a {wanted} model file, but there is none") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be a safetensors file: {error}") from error
    if METADATA_KEY not in metadata:
        raise ValueError(f"{path} must be made by manray, but its header has no {METADATA_KEY!r}")
    header: dict[str, Any] = json.loads(metadata[METADATA_KEY])
    if header["kind"] not in kinds:
        raise ValueError(f"{path} must hold a {wanted}, got a {header['kind']}")
    return header


def read_state(path: Path) -> dict[str, Tensor]:
    """The weights in a safetensors file by name."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
