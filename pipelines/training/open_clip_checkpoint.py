"""Released weights of an open_clip vision transformer as a model of ours.

The package is not needed and nothing of the file is run. Its names of weights are those of OpenAI's
CLIP: https://github.com/mlfoundations/open_clip. A release is `open_clip_model.safetensors`, or
`open_clip_pytorch_model.bin`, a pickled dictionary of fp32 weights.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from models.clip import Clip, ClipConfig
from pipelines.training.torch_file import TensorView, read_torch_file
from pipelines.training.weights import read_state

SOURCE = "open_clip"
HEAD_WIDTH = 64
# Heads by the image tower's width, in open_clip's model configs: B, L, H, g and bigG. The weights
# do not tell, and only those of the first two are 64 wide.
IMAGE_HEADS = {768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
NAMES = (
    (r"visual\.class_embedding", "image.class_embedding"),
    (r"visual\.positional_embedding", "image.position"),
    (r"visual\.conv1\.weight", "image.patch_embedding.weight"),
    (r"visual\.(ln_pre|ln_post)\.(weight|bias)", r"image.\1.\2"),
    (r"visual\.proj", "image.projection.weight"),
    (r"token_embedding\.weight", "text.embedding.weight"),
    (r"positional_embedding", "text.position"),
    (r"ln_final\.(weight|bias)", r"text.ln_final.\1"),
    (r"text_projection", "text.projection.weight"),
    (r"logit_scale", "logit_scale"),
)
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.([0-9]{1,3})\.(.+)")
IN_BLOCK = {
    "attn.in_proj_weight": "attn.c_attn.weight",
    "attn.in_proj_bias": "attn.c_attn.bias",
    "attn.out_proj.weight": "attn.c_proj.weight",
    "attn.out_proj.bias": "attn.c_proj.bias",
    **{
        f"mlp.{name}.{kind}": f"{name}.{kind}"
        for name in ("c_fc", "c_proj")
        for kind in ("weight", "bias")
    },
    **{
        f"{name}.{kind}": f"{name}.{kind}"
        for name in ("ln_1", "ln_2")
        for kind in ("weight", "bias")
    },
}
TRANSPOSED = ("image.projection.weight", "text.projection.weight")
DIFFERENCES_SHOWN = 3


@dataclass(frozen=True)
class OpenClipCheckpoint:
    """Weights under our names, fp32."""

    config: ClipConfig
    state: Mapping[str, Tensor]

    def load(self) -> Clip:
        """The model in eval mode."""
        with torch.device("meta"):
            model = Clip(self.config)
        model.load_state_dict(dict(self.state), strict=True, assign=True)
        return model.eval()


def read_open_clip(
    path: Path, *, activation: Literal["gelu", "quick_gelu"], image_heads: int = 0
) -> OpenClipCheckpoint:
    """Read and check a checkpoint; `image_heads` of 0 takes the heads of open_clip's own configs.

    Raises ValueError: there is no file, it is broken or no such model, or a weight is not finite.
    """
    if not path.is_file():
        raise ValueError(f"{path} must be a checkpoint of open_clip, but there is no such file")
    try:
        state = _renamed(_read(path))
        config = _config(state, activation, image_heads)
        _check(config, state)
    except ValueError as error:
        raise ValueError(f"{path} must be a vision transformer of open_clip: {error}") from error
    return OpenClipCheckpoint(config, state)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return read_state(path)
        except SafetensorError as error:
            raise ValueError(f"it is no safetensors file: {error}") from error
    file = read_torch_file(path, classes=frozenset(), functions=frozenset())
    if not isinstance(file.value, dict):
        raise ValueError("it holds no dictionary of weights")
    views: dict[str, TensorView] = {}
    for name, view in file.value.items():
        if not isinstance(name, str) or not isinstance(view, TensorView):
            raise ValueError(
                f"{str(name)[:80]!r} is no fp32 weight: a checkpoint of a training, with its "
                "optimizer, is none; save the model's state_dict alone"
            )
        views[name] = view
    return file.load(views)


def _renamed(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for name, tensor in found.items():
        ours = _our_name(name.removeprefix("module."))
        if ours is None or not tensor.is_floating_point():
            raise ValueError(f"it has {name[:80]!r}, which no plain ViT of open_clip has")
        tensor = tensor.float()
        state[ours] = tensor.t().contiguous() if ours in TRANSPOSED and tensor.ndim == 2 else tensor
    return state


def _our_name(name: str) -> str | None:
    if block := BLOCK.fullmatch(name):
        tower = "image" if block[1] else "text"
        inside = IN_BLOCK.get(block[3])
        return inside and f"{tower}.resblocks.{int(block[2])}.{inside}"
    for pattern, ours in NAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    return None


def _config(
    state: Mapping[str, Tensor], activation: Literal["gelu", "quick_gelu"], image_heads: int
) -> ClipConfig:
    """The sizes that the shapes and names tell; whether all shapes agree is checked after."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    try:
        image_width, _, patch_size, _ = shapes["image.patch_embedding.weight"]
        positions, _ = shapes["image.position"]
        text_len, text_width = shapes["text.position"]
        vocab_size, _ = shapes["text.embedding.weight"]
        embed_width, _ = shapes["image.projection.weight"]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"a weight that tells its sizes is not there or not so: {error}"
        ) from error
    if not image_heads and image_width not in IMAGE_HEADS:
        raise ValueError(
            f"its image tower is {image_width} wide, of {sorted(IMAGE_HEADS)} the heads are known: "
            "say how many it has (image_heads)"
        )
    return ClipConfig(
        image_size=patch_size * round((positions - 1) ** 0.5),
        patch_size=patch_size,
        image_width=image_width,
        image_layers=_layers(shapes, "image"),
        image_heads=image_heads or IMAGE_HEADS[image_width],
        text_len=text_len,
        vocab_size=vocab_size,
        text_width=text_width,
        text_layers=_layers(shapes, "text"),
        text_heads=max(1, text_width // HEAD_WIDTH),
        embed_width=embed_width,
        activation=activation,
    )


def _layers(shapes: Mapping[str, Any], tower: str) -> int:
    return len({name.split(".")[2] for name in shapes if name.startswith(f"{tower}.resblocks.")})


def _check(config: ClipConfig, state: Mapping[str, Tensor]) -> None:
    with torch.device("meta"):
        model = Clip(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = [
        f"{name} must have the shape {wanted.get(name)}, got {found.get(name)}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if wrong:
        raise ValueError(f"{len(wrong)} weights do not fit: {'; '.join(wrong[:DIFFERENCES_SHOWN])}")
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has values that are not finite")
