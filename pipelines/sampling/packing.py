"""A prior's weights as decoding wants them: in the precision asked for, laid out for few rows.

On CPUs oneDNN multiplies faster by a weight that was reordered before, and faster than MKL, which
`F.linear` uses in fp32, unless the processor is Intel's. Biases, GELU and the residual sum ride
along in the same call. Everywhere else a linear layer is torch's own; for MKL the weight is stored
with its columns side by side, which is what suits few rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import LayerKind
from models.linear import LINEAR, gelu_exponent
from models.onednn import mkl_is_faster, usable
from models.prior import AttentionResblock, MLPResblock, Prior

Precision = Literal["fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
PACKED_FOR_ROWS = 16  # a hint: packed weights serve any number of rows
# Of a batch whose rows must not depend on how many there are: MKL adds up in another order below
# four rows (on Intel's processors, with weights laid out as below, two), and oneDNN cuts long sums
# into parts for one row. On several threads MKL does so for some numbers of rows, oneDNN does not.
LEAST_ROWS = 4
_LINEAR = torch.tensor(LINEAR)


class PlainLinear:
    """A linear layer in the precision of the branches."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        self.weight, self.bias = layer.weight.detach().to(dtype), layer.bias.detach().to(dtype)
        if self.weight.device.type == "cpu" and dtype == torch.float32 and mkl_is_faster():
            self.weight = self.weight.t().contiguous().t()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def gelu(self, x: Tensor) -> Tensor:
        return _gelu(self(x))

    def add(self, x: Tensor, stream: Tensor) -> Tensor:
        """The fp32 stream and the layer's output."""
        return stream + self(x)


def _gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form; in fp32 on a CPU by a sigmoid, in half the time of ATen's tanh.

    Always the same for any number of rows: the two differ in their last bits.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return F.gelu(x, approximate="tanh")
    return gelu_exponent(x, _LINEAR).sigmoid_().mul_(x)


class PackedLinear(PlainLinear):
    """The same with a weight in oneDNN's order."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(layer, dtype)
        ops = torch.ops.mkldnn
        self.weight = ops._reorder_linear_weight(self.weight.contiguous(), PACKED_FOR_ROWS)
        self._run: Callable[..., Tensor] = ops._linear_pointwise.default
        self._run_and_add: Callable[..., Tensor] = ops._linear_pointwise.binary
        self._adds = dtype == torch.float32  # the stream is fp32, and oneDNN adds like to like

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(x, self.weight, self.bias, "none", [], "")

    def gelu(self, x: Tensor) -> Tensor:
        return self._run(x, self.weight, self.bias, "gelu", [], "tanh")

    def add(self, x: Tensor, stream: Tensor) -> Tensor:
        if self._adds:
            return self._run_and_add(x, stream, self.weight, self.bias, "add")
        return stream + self(x)


class Norm:
    """LayerNorm of the fp32 stream, given to a branch in its precision."""

    def __init__(self, layer: nn.LayerNorm, dtype: torch.dtype) -> None:
        self.shape, self.eps = list(layer.normalized_shape), layer.eps
        self.weight, self.bias = layer.weight.detach(), layer.bias.detach()
        self.dtype = dtype

    def __call__(self, x: Tensor) -> Tensor:
        normed = torch.layer_norm(x, self.shape, self.weight, self.bias, self.eps)
        return normed if self.dtype == torch.float32 else normed.to(self.dtype)


@dataclass(frozen=True)
class AttentionWeights:
    """Of an attention resblock."""

    kind: LayerKind
    norm: Norm
    qkv: PlainLinear
    out: PlainLinear


@dataclass(frozen=True)
class MLPWeights:
    """Of an MLP resblock."""

    norm: Norm
    fc: PlainLinear
    out: PlainLinear


class StepWeights:
    """All that a step multiplies by. The stream, embeddings and logits are fp32, as in training."""

    def __init__(self, prior: Prior, precision: Precision) -> None:
        self.prior, self.config, self.precision = prior, prior.config, precision
        self.dtype, self.device = DTYPES[precision], prior.row_position.device
        # CPUs multiply small matrices in fp32 several times as fast as in bf16, and the copy that
        # takes heads apart converts on the way.
        self.cache_dtype = torch.float32 if self.device.type == "cpu" else self.dtype
        # A list, to be walked without nn.Module's machinery.
        self.blocks = [self._block(block) for block in prior.resblocks]
        self.kinds = [block.kind for block in self.blocks if isinstance(block, AttentionWeights)]
        self.norm = Norm(prior.ln_final, torch.float32)
        self.image_head = self._linear(prior.image_head, torch.float32)
        self.text_head = self._linear(prior.text_head, torch.float32)
        index = torch.arange(self.config.image_len, device=self.device)
        row, column = index // self.config.grid, index % self.config.grid
        self.image_position = prior.row_position[row] + prior.column_position[column]  # (L, C)

    def _block(self, block: nn.Module) -> AttentionWeights | MLPWeights:
        if isinstance(block, AttentionResblock):
            qkv, out = (self._linear(x, self.dtype) for x in (block.attn.c_attn, block.attn.c_proj))
            return AttentionWeights(block.kind, Norm(block.ln, self.dtype), qkv, out)
        assert isinstance(block, MLPResblock)
        fc, out = (self._linear(layer, self.dtype) for layer in (block.c_fc, block.c_proj))
        return MLPWeights(Norm(block.ln, self.dtype), fc, out)

    def _linear(self, layer: nn.Linear, dtype: torch.dtype) -> PlainLinear:
        packs = can_pack(self.device, dtype) and not (dtype == torch.float32 and mkl_is_faster())
        return (PackedLinear if packs else PlainLinear)(layer, dtype)


class PackedPrior:
    """A prior and its weights laid out for decoding, once for each precision that is asked for.

    They may be copies: a change of the prior's weights afterwards goes unnoticed.
    """

    def __init__(self, prior: Prior) -> None:
        self.prior = prior
        self._weights: dict[Precision, StepWeights] = {}

    def weights(self, precision: Precision) -> StepWeights:
        if precision not in self._weights:
            with torch.no_grad():
                self._weights[precision] = StepWeights(self.prior, precision)
        return self._weights[precision]


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build and this CPU have oneDNN's linear layer in that precision."""
    return device.type == "cpu" and usable(dtype, ("_linear_pointwise", "_reorder_linear_weight"))
