"""The encoder of stage one for inference only: the same features, sooner.

Letters: B batch, H and W picture sides, g grid side.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.onednn import PackedConv2d, RowWinograd, usable
from models.stage_one import PICTURE_CHANNELS, Conv2d, Encoder, ResBlock

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# On a CPU a batch goes through in parts of one picture of the paper's size: larger parts take more
# memory and are not faster.
PIXELS_AT_ONCE = 256 * 256
WINOGRAD_FROM = 64  # channels out: with fewer, the transforms cost what the products save


class FastEncoder(nn.Module):
    """What `Encoder` computes, from a copy of its weights that is laid out for one processor.

    It is put in the encoder's place where it runs: ``model.encoder = FastEncoder(model.encoder,
    "bf16")``. It has no parameters, so that it cannot be trained, saved or moved, and it keeps
    nothing of the encoder it was made from. `precision` is that of the weights and of what lies
    between the convolutions; the features and the convolution that makes them are fp32, as they
    are under autocast, which changes nothing here.
    """

    def __init__(self, encoder: nn.Module, precision: Precision) -> None:
        super().__init__()
        if not isinstance(encoder, Encoder):
            raise ValueError(f"encoder must be a stage_one.Encoder, got {type(encoder).__name__}")
        if precision not in DTYPES:
            names = ", ".join(get_args(Precision))
            raise ValueError(f"precision must be one of {names}, got {precision!r}")
        self.device = next(encoder.parameters()).device
        if precision == "fp16" and self.device.type == "cpu":  # torch has no fast one
            raise ValueError("precision must be fp32 or bf16 on a CPU, got 'fp16'")
        self.dtype = DTYPES[precision]
        first, *groups, output = encoder.blocks
        _, head = output.children()
        self._input = _convolution(first, self.dtype)
        self._steps = [_step(step, self.dtype) for group in groups for step in group.children()]
        self._head = _convolution(head, torch.float32)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W) to (B, feature_width, g, g)
        self._check(x)
        with torch.autocast(self.device.type, enabled=False):
            parts = [F.relu(self._body(part)).float() for part in x.split(self._part_size(x))]
            return self._head(torch.cat(parts))

    def _body(self, x: Tensor) -> Tensor:
        x = self._input(x.to(self.dtype, memory_format=torch.channels_last))
        for step in self._steps:
            x = step(x)
        return x

    def _part_size(self, x: Tensor) -> int:
        if self.device.type != "cpu":
            return len(x)
        return max(1, PIXELS_AT_ONCE // (x.shape[2] * x.shape[3]))

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != PICTURE_CHANNELS or x.dtype != torch.float32 or not len(x):
            raise ValueError(
                f"pixels must be float32 (B, 3, H, W) of B >= 1, got {x.dtype} {tuple(x.shape)}"
            )
        if x.device != self.device:
            raise ValueError(
                f"pixels must be on {self.device}, where the encoder was made, got {x.device}"
            )


class PlainConv2d:
    """A "same" convolution as torch runs it: on CUDA, and where oneDNN is not usable."""

    def __init__(self, w: Tensor, b: Tensor) -> None:
        self.w = w.clone(memory_format=torch.channels_last)
        self.b = b.clone()

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)

    def add_to(self, total: Tensor, x: Tensor) -> None:
        """total += the convolution of x."""
        total.add_(self(x))


class FastResBlock:
    """A `ResBlock` without `upsample` that overwrites its input."""

    def __init__(self, block: ResBlock, dtype: torch.dtype) -> None:
        assert not block.upsample
        *convs, last = [conv for conv in block.res_path if isinstance(conv, Conv2d)]
        self.convs = [_activated_convolution(conv, dtype) for conv in convs]
        self.last = _convolution(last, dtype, gain=block.gain)
        changes_width = isinstance(block.id_path, Conv2d)
        self.skip = _convolution(block.id_path, dtype) if changes_width else None

    def __call__(self, x: Tensor) -> Tensor:
        narrow = x
        for conv in self.convs:
            narrow = conv(narrow)
        total = x if self.skip is None else self.skip(x)
        self.last.add_to(total, narrow.relu_())
        return total


def _step(module: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    if isinstance(module, ResBlock):
        return FastResBlock(module, dtype)
    assert isinstance(module, nn.MaxPool2d)
    return nn.MaxPool2d(module.kernel_size)


def _activated_convolution(conv: Conv2d, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The convolution of the ReLU of its input."""
    if len(conv.w) >= WINOGRAD_FROM and _packs(conv.w, dtype):
        return RowWinograd(*_weights(conv, dtype))
    plain = _convolution(conv, dtype)
    return lambda x: plain(F.relu(x))


def _convolution(
    conv: nn.Module, dtype: torch.dtype, gain: float = 1.0
) -> PackedConv2d | PlainConv2d:
    assert isinstance(conv, Conv2d)
    kind = PackedConv2d if _packs(conv.w, dtype) else PlainConv2d
    return kind(*_weights(conv, dtype, gain))


def _packs(w: Tensor, dtype: torch.dtype) -> bool:
    return w.device.type == "cpu" and usable(dtype)


def _weights(conv: Conv2d, dtype: torch.dtype, gain: float = 1.0) -> tuple[Tensor, Tensor]:
    """The gain is multiplied in before anything is rounded."""
    w, b = conv.w.detach().float(), conv.b.detach().float()
    return (w * gain).to(dtype), (b * gain).to(dtype)
