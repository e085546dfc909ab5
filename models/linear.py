"""What a branch of the prior is made of: `Linear`, and GELU in its tanh form, as fast as a CPU can.

torch runs fp32 products through MKL, which keeps to AVX2 on processors that are not Intel's; there
oneDNN, which takes what there is, runs ours. Both multiply and add in fp32. In 16 bits torch takes
oneDNN itself, and what is ours is the bias: its gradient is fp32, as the paper keeps all of biases
(appendix D.2).

Letters: M rows, C channels in, K channels out.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.onednn import mkl_is_faster, usable

ENOUGH_ROWS = 64  # below, oneDNN takes longer to lay out the weights than to multiply
CHUNK = 1 << 17  # numbers that GELU works on at a time: they stay in the second-level cache
# tanh-GELU (Hendrycks and Gimpel, 2016, arXiv:1606.08415) is x·sigmoid(x·(LINEAR + CUBIC·x²)).
LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = LINEAR * 0.044715


class Linear(nn.Linear):
    """nn.Linear, forwards and backwards through oneDNN where that is faster.

    Under autocast it runs in 16 bits, with a gradient of the bias in fp32.
    """

    def forward(self, x: Tensor) -> Tensor:  # (…, C) -> (…, K)
        y: Tensor
        device = x.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            y = F.linear(x.to(dtype), self.weight.to(dtype), self.bias.detach().to(dtype))
            y = _BiasGradient.apply(y, self.bias)
            return y
        if not _suits_onednn(x):
            return F.linear(x, self.weight, self.bias)
        y = _Linear.apply(x, self.weight, self.bias)
        return y


def gelu(x: Tensor) -> Tensor:
    """F.gelu(x, approximate="tanh")."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    y: Tensor = _Gelu.apply(x)
    return y


def product(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x wᵀ + b of (…, C), (K, C), (K,); autograd does not see it."""
    if not _suits_onednn(x):
        return F.linear(x, w, b)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")
    return y


def transposed_product(g: Tensor, x: Tensor) -> Tensor:
    """gᵀ x of (M, K), (M, C)."""
    # oneDNN is a sixth faster if its second factor is the wider one.
    if g.shape[1] <= x.shape[1]:
        return product(g.t(), x.t())
    return product(x.t(), g.t()).t().contiguous()


def _suits_onednn(x: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False  # the compiler chooses kernels itself, and cannot see into ours
    if x.device.type != "cpu" or x.dtype != torch.float32 or not _prefers_onednn():
        return False
    return x.numel() >= ENOUGH_ROWS * x.shape[-1]


@functools.cache
def _prefers_onednn() -> bool:
    """The operator is the one that torch.compile uses on a CPU."""
    return usable(torch.float32, ("_linear_pointwise",)) and not mkl_is_faster()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return product(x, w, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, w = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        dx = product(rows, w.t()).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, transposed_product(rows, x.flatten(0, -2)), rows.sum(dim=0)


class _BiasGradient(torch.autograd.Function):
    """Nothing forwards; backwards the gradient of a bias that was added in 16 bits, in fp32.

    Torch's own under autocast sums it into 16 bits: at a scale that suits the rest of a resblock
    the sum over all rows is the first number to overflow. Beside the product, not around it: torch
    keeps its own product's factors before it multiplies, so that a recomputation stops there.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, b: Tensor) -> Tensor:
        ctx.dtype = b.dtype
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        summed = gradient.flatten(0, -2).sum(dim=0, dtype=torch.float32)
        return gradient, summed.to(ctx.dtype)


def gelu_exponent(x: Tensor, linear: Tensor) -> Tensor:
    """What GELU takes the sigmoid of; `linear` is LINEAR, in the precision that x has."""
    return torch.addcmul(linear, x, x, value=CUBIC).mul_(x)


class _Gelu(torch.autograd.Function):
    """In fp32 inside, or what is wider; ATen's spends most of its time in tanh.

    The slope is made with the value, where both need the same, and is kept instead of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        y, slope = torch.empty_like(x), torch.empty_like(x)
        linear = torch.tensor(LINEAR, dtype=torch.promote_types(x.dtype, torch.float32))
        for part, out, slope_out in zip(*map(_chunks, (x, y, slope)), strict=True):
            part = part.to(linear.dtype)
            z = gelu_exponent(part, linear)
            gate = torch.sigmoid(z)
            torch.mul(part, gate, out=out)
            if ctx.needs_input_grad[0]:
                # (x·s)' = s + s·(1 - s)·x·z', where s = sigmoid(z) and x·z' = 3·z - 2·LINEAR·x.
                bend = torch.add(part, z, alpha=-1.5 / LINEAR, out=z)
                bend = torch.ops.aten.sigmoid_backward(bend, gate)
                torch.add(gate, bend, alpha=-2 * LINEAR, out=slope_out)
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return gradient * slope


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    return x.view(-1).split(CHUNK)
