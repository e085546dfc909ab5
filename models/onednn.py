"""Where oneDNN is the better library, and convolutions of inference through it: packed weights,
sums in place, fewer products.

torch's own convolution lays weights out anew at every call. The operators here are those that
torch.compile uses on a CPU; where they are missing, `usable` says so.
Letters: B batch, H and W sides, C channels in, K channels out, T tiles of TILE rows.
"""

import functools
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

CONVOLUTION = ("_convolution_pointwise", "_convolution_pointwise_", "_reorder_convolution_weight")
TILE = 4  # rows that RowWinograd makes at a time
TAPS = TILE + 2  # rows that they depend on
CHUNK_BYTES = 8 << 20  # of transformed rows at a time: they stay in the cache
# Winograd's F(4, 3) at the points 0, 1, -1, 2, -2 and infinity (Lavin and Gray, 2015,
# arXiv:1509.09308): the six factors that a kernel's three taps become.
KERNEL_FACTORS = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)


def usable(dtype: torch.dtype, operators: tuple[str, ...] = CONVOLUTION) -> bool:
    """Whether this torch has the operators, and this processor the instructions for a dtype."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in operators):
        return False
    if dtype == torch.bfloat16:  # elsewhere oneDNN has it only as a slow reference
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


@functools.cache
def mkl_is_faster() -> bool:
    """Whether MKL, torch's own choice in fp32, multiplies matrices faster than oneDNN.

    On an Intel processor: by a tenth with a thousand rows, by three times with four. On others it
    keeps to AVX2.
    """
    try:
        intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return intel and torch.backends.mkl.is_available()


class PackedConv2d:
    """A "same" convolution of a (B, C, H, W) in channels_last.

    Which layout is best depends on the number of pixels, and weights in another one are laid out
    anew at every call, for several times the convolution's own work. So they are packed at the
    first call, and again when the number of pixels has changed much.
    """

    def __init__(self, w: Tensor, b: Tensor | None) -> None:  # (K, C, h, w), (K,)
        self.padding = [w.shape[2] // 2, w.shape[3] // 2]
        self.w = w.clone(memory_format=torch.contiguous_format)
        self.b = None if b is None else b.clone()
        self.packed_for = 0

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self._packed(x), self.b, self.padding, [1, 1], [1, 1], 1, "none", [], ""
        )
        return y

    def add_to(self, total: Tensor, x: Tensor) -> None:
        """total += the convolution of x."""
        torch.ops.mkldnn._convolution_pointwise_.binary(
            *(total, x, self._packed(x), self.b, self.padding, [1, 1], [1, 1], 1),
            *("add", 1.0, None, [], None),
        )

    def _packed(self, x: Tensor) -> Tensor:
        w, pixels = self.w, x.shape[0] * x.shape[2] * x.shape[3]
        if not self.packed_for <= 2 * pixels <= 4 * self.packed_for:
            dense = w.to_dense() if w.is_mkldnn else w
            w = torch.ops.mkldnn._reorder_convolution_weight(
                dense, self.padding, [1, 1], [1, 1], 1, list(x.shape)
            )
            self.w, self.packed_for = w, pixels
        return w


class RowWinograd:
    """The 3x3 convolution of relu(x), in half the multiplications.

    Down the rows it is Winograd's minimal filtering, along a row an ordinary convolution with
    three taps, which oneDNN runs at its full rate. In bf16 what is rounded is larger than what
    comes out: the result is 2.5 times as far off as a direct convolution's.
    """

    def __init__(self, w: Tensor, b: Tensor) -> None:  # (K, C, 3, 3), (K,)
        factors = torch.tensor(KERNEL_FACTORS, dtype=torch.float64)
        rows = torch.einsum("pi,kcij->pkcj", factors, w.double()).to(w.dtype)  # (6, K, C, 3)
        # The bias enters where the point is 1, and so reaches each row of a tile once.
        self.convs = [
            PackedConv2d(row.unsqueeze(2), b if i == 1 else None) for i, row in enumerate(rows)
        ]
        self.n_out = w.shape[0]

    def __call__(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, K, H, W), channels_last
        x = x.permute(0, 2, 3, 1)
        batch, height, width, n_in = x.shape
        y = x.new_empty(batch, height, width, self.n_out)
        tiles = -(-height // TILE)
        tile_bytes = TAPS * batch * width * n_in * x.element_size()
        chunks = min(tiles, 1 + tiles * tile_bytes // CHUNK_BYTES)
        # Of nearly the same size, so that the weights' layout suits all of them.
        bounds = [TILE * (tiles * i // chunks) for i in range(chunks + 1)]
        for top, bottom in pairwise(bounds):
            factors = _factors(_activated(x, top, bottom))
            products = [
                conv(factor.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
                for conv, factor in zip(self.convs, factors, strict=True)
            ]
            _combine(products, y[:, top:bottom])
        return y.permute(0, 3, 1, 2)


def _activated(x: Tensor, top: int, bottom: int) -> Tensor:  # (B, H, W, C) -> (B, 4 T + 2, W, C)
    """relu of the rows that those from `top` to `bottom` depend on; 0 outside the picture."""
    rows = x.new_empty(x.shape[0], bottom - top + 2, *x.shape[2:])
    first, last = max(0, top - 1), min(x.shape[1], bottom + 1)
    above, below = first - (top - 1), last - (top - 1)
    rows[:, :above] = 0
    rows[:, below:] = 0
    torch.clamp_min(x[:, first:last], 0, out=rows[:, above:below])
    return rows


def _factors(rows: Tensor) -> Tensor:  # (B, 4 T + 2, W, C) -> (6, B, T, W, C)
    """The six combinations of a tile's rows that the kernel's factors are multiplied with."""
    d = rows.unfold(1, TAPS, TILE).unbind(-1)  # of (B, T, W, C)
    out = rows.new_empty(TAPS, *d[0].shape)
    even, odd = torch.sub(d[4], d[2], alpha=4), torch.sub(d[3], d[1], alpha=4)
    torch.add(even, odd, out=out[1])
    torch.sub(even, odd, out=out[2])
    torch.sub(d[4], d[2], out=even)
    torch.sub(d[3], d[1], out=odd)
    torch.add(even, odd, alpha=2, out=out[3])
    torch.sub(even, odd, alpha=2, out=out[4])
    torch.sub(d[4], d[2], alpha=5, out=out[0]).add_(d[0], alpha=4)
    torch.sub(d[5], d[3], alpha=5, out=out[5]).add_(d[1], alpha=4)
    return out


def _combine(m: list[Tensor], y: Tensor) -> None:  # 6 of (B, T, W, K), (B, <= 4 T, W, K)
    """The tiles' rows from the six products, which are overwritten."""
    even, odd = m[1] + m[2], m[1].sub_(m[2])
    even_2, odd_2 = m[3] + m[4], m[3].sub_(m[4])
    terms = [
        (m[0].add_(even), even_2, 1),
        (odd, odd_2, 2),
        (even, even_2, 4),
        (m[5].add_(odd), odd_2, 8),
    ]
    for i, (one, other, factor) in enumerate(terms):
        row = y[:, i::TILE]  # of the last tile, rows below the picture are not wanted
        torch.add(one[:, : row.shape[1]], other[:, : row.shape[1]], alpha=factor, out=row)
