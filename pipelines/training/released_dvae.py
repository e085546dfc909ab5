"""OpenAI's released dVAE, two pickled modules of the package dall_e, as a model of ours.

Their names and shapes of weights are ours, below `encoder.` and `decoder.`. The package is not
needed, and none of its code is run: https://github.com/openai/DALL-E (encoder.pkl, decoder.pkl).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models.dvae import DVAE, DVAEConfig
from pipelines.training.restricted_pickle import Global, Instance
from pipelines.training.torch_file import TensorView, TorchFile, read_torch_file
from pipelines.training.weights import save_model

SOURCE = "openai/DALL-E"
# The modules of dall_e 0.1 and what they are made of, as torch.save names them.
ROOTS = {
    "encoder": Global("dall_e.encoder", "Encoder"),
    "decoder": Global("dall_e.decoder", "Decoder"),
}
BLOCKS = (Global("dall_e.encoder", "EncoderBlock"), Global("dall_e.decoder", "DecoderBlock"))
POOL = Global("torch.nn.modules.pooling", "MaxPool2d")
UPSAMPLE = Global("torch.nn.modules.upsampling", "Upsample")
CLASSES = frozenset(
    {
        *(*ROOTS.values(), *BLOCKS, POOL, UPSAMPLE),
        Global("dall_e.utils", "Conv2d"),
        Global("torch.nn.modules.activation", "ReLU"),
        Global("torch.nn.modules.container", "Sequential"),
        Global("torch.nn.modules.linear", "Identity"),
    }
)
FUNCTIONS = frozenset({Global("torch", "device")})  # where the weights were: nothing to us
# The package has four groups; the rest are 16 times the released sizes: more is no dVAE.
GROUPS = 4
LARGEST = {"n_hid": 4096, "n_init": 2048, "n_blk_per_group": 32}
MAX_DEPTH = 6  # blocks.group_1.block_1.res_path.conv_1 has five
NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
BLOCK = re.compile(r"blocks\.group_1\.block_[0-9]+")
DIFFERENCES_SHOWN = 3


@dataclass(frozen=True)
class ReleasedDVAE:
    """Two files that fit each other and a model of ours; their weights are not read yet."""

    config: DVAEConfig
    files: Mapping[str, TorchFile]
    views: Mapping[str, Mapping[str, TensorView]]

    def load(self) -> DVAE:
        """The model with the released weights, in eval mode; ValueError if one is not finite."""
        state = {
            f"{half}.{name}": tensor
            for half, file in self.files.items()
            for name, tensor in file.load(self.views[half]).items()
        }
        with torch.device("meta"):
            model = DVAE(self.config)
        model.load_state_dict(state, strict=True, assign=True)
        return model.eval()


def read_released(encoder: Path, decoder: Path, *, image_size: int = 256) -> ReleasedDVAE:
    """Check both files, all but the weights' values; ValueError with the file's name if not so."""
    files, views = {}, {}
    for half, path in {"encoder": encoder, "decoder": decoder}.items():
        if not path.is_file():
            raise ValueError(
                f"{half} must be OpenAI's released {half}.pkl, but there is no file {path}: "
                f"download https://cdn.openai.com/dall-e/{half}.pkl"
            )
        files[half] = read_torch_file(path, classes=CLASSES, functions=FUNCTIONS)
        try:
            views[half] = dict(_weights(_modules(files[half].value, ROOTS[half])))
        except ValueError as error:
            raise ValueError(f"{path} must be a released {half}, but {error}") from None
    try:
        config = _config(views["encoder"], views["decoder"], image_size)
        _check_shapes(config, views)
    except ValueError as error:
        raise ValueError(f"{encoder} and {decoder} must be one dVAE, but {error}") from None
    return ReleasedDVAE(config, files, views)


def save_released(path: Path, model: DVAE, digests: Mapping[str, str]) -> None:
    """Write the model file; `digests` are the SHA-256 of the two released files by half."""
    metadata = {"source": SOURCE} | {f"{half}_sha256": sha for half, sha in digests.items()}
    save_model(path, kind="dvae", config=model.config, state=model.state_dict(), metadata=metadata)


def _modules(root: Any, cls: Global) -> dict[str, Instance]:
    """All modules by name; the root's name is empty."""
    if not isinstance(root, Instance) or root.cls != cls:
        raise ValueError(f"it holds no {cls}")
    modules = dict(_walk("", root, set()))
    n_layers = GROUPS * sum(BLOCK.fullmatch(name) is not None for name in modules)
    for name, module in modules.items():
        _check_settings(name, module, n_layers)
    return modules


def _walk(name: str, module: Any, seen: set[int]) -> Iterator[tuple[str, Instance]]:
    # Each module once and not too deep: a file may nest or repeat modules without end.
    if not isinstance(module, Instance) or id(module) in seen or name.count(".") >= MAX_DEPTH:
        raise ValueError(f"{name} is no module of its own")
    seen.add(id(module))
    yield name, module
    for child, value in _table(module, "_modules"):
        yield from _walk(f"{name}.{child}" if name else child, value, seen)


def _check_settings(name: str, module: Instance, n_layers: int) -> None:
    """What our model does not read from the file must be in it as our model does it."""
    expected: dict[str, Any] = {}
    if module.cls in BLOCKS:
        expected = {"post_gain": 1 / max(n_layers, 1) ** 2}
    elif module.cls == POOL:
        expected = {"kernel_size": 2, "stride": 2, "padding": 0, "dilation": 1}
    elif module.cls == UPSAMPLE:
        expected = {"scale_factor": 2, "mode": "nearest"}
    for key, value in expected.items():
        if (module.state or {}).get(key) != value:
            raise ValueError(f"{key} of {name} is not {value}")


def _weights(modules: Mapping[str, Instance]) -> Iterator[tuple[str, TensorView]]:
    for name, module in modules.items():
        if _table(module, "_buffers"):
            raise ValueError(f"{name} has buffers")
        for key, view in _table(module, "_parameters"):
            if not isinstance(view, TensorView):
                raise ValueError(f"{key} of {name} is no weight")
            yield f"{name}.{key}", view


def _table(module: Instance, key: str) -> list[tuple[str, Any]]:
    """One of the tables of names that every torch module has."""
    table = (module.state or {}).get(key)
    if not isinstance(table, dict) or not all(map(NAME.fullmatch, table)):
        raise ValueError(f"a {module.cls} has no fit {key}")
    return list(table.items())


def _config(
    encoder: Mapping[str, TensorView], decoder: Mapping[str, TensorView], image_size: int
) -> DVAEConfig:
    """The sizes that the shapes and names tell; whether all shapes agree is checked after."""
    for name in ("blocks.input.w", "blocks.output.conv.w"):
        if any(len(half[name].size) != 4 for half in (encoder, decoder) if name in half):
            raise ValueError(f"{name} is no convolution")
        if name not in encoder or name not in decoder:
            raise ValueError(f"{name} is not in both")
    blocks = {name.split(".")[2] for name in encoder if BLOCK.match(name)}
    config = {
        "vocab_size": encoder["blocks.output.conv.w"].size[0],
        "n_hid": encoder["blocks.input.w"].size[0],
        "n_init": decoder["blocks.input.w"].size[0],
        "n_blk_per_group": len(blocks),
    }
    for name, most in LARGEST.items():
        if config[name] > most:
            raise ValueError(f"{name} must be at most {most}, got {config[name]}")
    return DVAEConfig(image_size=image_size, group_count=GROUPS, **config)


def _check_shapes(config: DVAEConfig, views: Mapping[str, Mapping[str, TensorView]]) -> None:
    with torch.device("meta"):
        model = DVAE(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {
        f"{half}.{name}": view.size for half, part in views.items() for name, view in part.items()
    }
    wrong = [
        f"{name} must have the shape {wanted.get(name)}, got {found.get(name)}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if wrong:
        shown = "; ".join(wrong[:DIFFERENCES_SHOWN])
        raise ValueError(f"{len(wrong)} weights do not fit: {shown}")
