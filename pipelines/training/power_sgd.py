"""PowerSGD between machines: gradients are reduced as products of two thin matrices.

Vogels et al., 2019 (arXiv:1905.13727), as the paper does it (section 2.5, appendix E). Within a
group of workers, a machine, gradients are reduced whole; every worker then holds the mean gradient
of its shard, and shards of the same part of a matrix are reduced between the machines:

    M = gradient / gradient scale + error          what is to be sent, (m, n)
    P = mean over machines of M Q                  (m, r); Q is drawn once, (n, r), Gaussian
    P = an orthonormal basis of P's columns
    R = mean over machines of Mᵀ P                 (n, r)
    gradient = P Rᵀ · gradient scale;  error = M - P Rᵀ

What is lost stays in the error and is sent later: the sum of what is applied is the sum of the
gradients, less the last error. With a fixed Q the error has no part in P (error · Q is 0): it is
sent as gradients turn into other directions, which those of new samples do, and would never be if
they stood still. All that is no matrix of a resblock (gains, biases, embeddings, heads) is reduced
whole, in fp32.

FSDP calls the hooks between the reduction within the group and the gradient's place, so that it is
hidden behind the backward pass, and clipping, scaling and the optimizer see gradients as always.

An update that is skipped because a gradient is not finite loses what it sent, as in the paper. A
matrix that is not finite itself keeps the error that it had: the paper sets it to zero.
"""

import math
import zlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from pipelines.training.prior_training import WIRE, PowerSGDConfig

SHIFT = 1e-13  # of the squared norm: fp64's rounding of a product of 10^3 rows


class PowerSGD:
    """The gradients' reduction over `group`: the workers that hold the same shard.

    `units` are FSDP's, each with its own parameters by name, in its order.
    """

    def __init__(
        self,
        units: Iterable[tuple[FSDPModule, Mapping[str, nn.Parameter]]],
        config: PowerSGDConfig,
        group: dist.ProcessGroup,
        seed: int,
    ) -> None:
        self.config, self.group, self.seed = config, group, seed
        self.sent_bytes = 0
        """Handed to the network so far."""
        self.errors: dict[str, DTensor] = {}
        """By parameter name, sharded as the parameters are."""
        self._sketches: dict[tuple[int, int], Tensor] = {}
        for module, parameters in units:
            hook = _Hook(self, module, parameters)
            module.set_all_reduce_hook(hook)

    def state_dict(self) -> dict[str, DTensor]:
        """The errors by parameter name, sharded as the parameters are; every rank must ask.

        Only their mean over the machines matters to what follows, so each machine's is set to it:
        a checkpoint need not hold one for every machine, and whoever goes on from it, with as many
        machines or others, goes on as this training does.
        """
        for error in self.errors.values():
            local = error.to_local()
            dist.all_reduce(local.div_(self.group.size()), group=self.group)
        return dict(self.errors)

    def error_of(self, name: str, parameter: DTensor) -> Tensor:
        """A matrix's error: this rank's shard."""
        local = torch.zeros_like(parameter.to_local(), device=parameter.device)
        self.errors[name] = DTensor.from_local(
            local,
            parameter.device_mesh,
            parameter.placements,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        return self.errors[name].to_local()

    def sketch(self, columns: int, rank: int, device: torch.device) -> Tensor:
        """Q of all matrices of that size: drawing it anew hurts (paper, appendix E)."""
        if (columns, rank) not in self._sketches:
            name = f"{self.seed}/power_sgd/{columns}x{rank}"
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            drawn = torch.randn(columns, rank, generator=generator) / math.sqrt(columns)
            self._sketches[columns, rank] = drawn.to(device)
        return self._sketches[columns, rank]

    def mean(self, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Over the group, of all in one message of that precision; they come back in fp32."""
        message = torch.cat([tensor.flatten() for tensor in tensors]).to(dtype)
        message.div_(self.group.size())
        dist.all_reduce(message, group=self.group)
        self.sent_bytes += message.numel() * message.element_size()
        parts = message.float().split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


class _Matrix(NamedTuple):
    """A compressed shard: where it lies in a unit's gradients, and its error."""

    start: int
    error: Tensor
    rank: int

    def oriented(self, x: Tensor) -> Tensor:
        """The shard, or its transpose, with no more rows than columns: less to orthogonalise."""
        return x.mT if self.error.shape[0] > self.error.shape[1] else x

    def of(self, flat: Tensor) -> Tensor:
        """Its part of a unit's gradients."""
        return flat[self.start : self.start + self.error.numel()].view_as(self.error)


class _Hook:
    """What FSDP calls with the gradients of a unit, reduced within the group, one after the other.

    Matrices of equal size go through the batched operations of one product.
    """

    def __init__(
        self, owner: PowerSGD, module: FSDPModule, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        self.owner, self.block = owner, getattr(module, "_checkpoint_wrapped_module", module)
        self.whole: list[slice] = []
        batches: dict[tuple[int, int], list[_Matrix]] = {}
        start = 0
        for name, parameter in parameters.items():
            assert isinstance(parameter, DTensor)
            size = _padded_size(parameter)
            rank = _rank(name, parameter, owner.config)
            if rank:
                matrix = _Matrix(start, owner.error_of(name, parameter), rank)
                shape = matrix.oriented(matrix.error).shape
                batches.setdefault((shape[0], shape[1]), []).append(matrix)
            else:
                self.whole.append(slice(start, start + size))
            start += size
        self.size, self.batches = start, list(batches.values())

    @torch.no_grad()
    def __call__(self, flat: Tensor) -> None:
        """Replace a unit's gradients, (size,) in fp32, by their mean over the machines."""
        if flat.shape != (self.size,) or flat.dtype != torch.float32:
            raise RuntimeError(
                f"FSDP must hand over a unit's {self.size} gradients in fp32, got "
                f"{tuple(flat.shape)} {flat.dtype}: this version of torch lays them out otherwise"
            )
        if flat.is_cuda:
            # FSDP made it on another stream, and may free it before this one has read it.
            flat.record_stream(torch.cuda.current_stream())
        if self.whole:
            parts = [flat[part] for part in self.whole]
            for part, mean in zip(parts, self.owner.mean(parts, torch.float32), strict=True):
                part.copy_(mean)
        if self.batches:
            self._compress(flat)

    def _compress(self, flat: Tensor) -> None:
        scale = getattr(self.block, "gradient_scale", None)
        factor = flat.new_ones(()) if scale is None else scale
        wanted = [_wanted(batch, flat, factor) for batch in self.batches]  # (k, m, n) each
        wire = WIRE[self.owner.config.wire]
        sketches = [
            self.owner.sketch(m.shape[-1], batch[0].rank, flat.device)
            for m, batch in zip(wanted, self.batches, strict=True)
        ]
        p = self.owner.mean([m @ q for m, q in zip(wanted, sketches, strict=True)], wire)
        p = [orthonormal(columns) for columns in p]
        r = self.owner.mean([m.mT @ left for m, left in zip(wanted, p, strict=True)], wire)
        for batch, m, left, right in zip(self.batches, wanted, p, r, strict=True):
            finite = (left.sum((1, 2)) + right.sum((1, 2))).isfinite()
            sent = left @ right.mT
            lost = m.sub_(sent)
            for index, matrix in enumerate(batch):
                matrix.of(flat).copy_(matrix.oriented(sent[index]) * factor)
                error = torch.where(finite[index], matrix.oriented(lost[index]), matrix.error)
                matrix.error.copy_(error)


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the columns' span, (k, m, r) for m of at least r.

    Cholesky QR twice (Yamamoto et al., 2015), in fp64: batched products and nothing that waits for
    the host, where Householder's and Gram-Schmidt's methods are hundreds of small steps. What was
    computed in fp32 has a condition below fp64's limit of 10^8; the shift keeps the factor defined
    where columns depend on each other. A direction that is all rounding comes out no longer than
    1, so what is sent of it is never more than there is.
    """
    basis = columns.double()
    for _ in range(2):
        gram = basis.mT @ basis
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        diagonal.add_(diagonal.sum(-1, keepdim=True) * SHIFT + 1e-300)
        factor, _ = torch.linalg.cholesky_ex(gram)
        basis = torch.linalg.solve_triangular(factor.mT, basis, upper=True, left=False)
    return basis.to(columns.dtype)


def _wanted(batch: list[_Matrix], flat: Tensor, factor: Tensor) -> Tensor:
    """(k, m, n): gradients less their scale, and what earlier updates have not sent of them."""
    parts = [
        matrix.oriented(torch.addcdiv(matrix.error, matrix.of(flat), factor)) for matrix in batch
    ]
    return torch.stack(parts)


def _rank(name: str, parameter: DTensor, config: PowerSGDConfig) -> int:
    """0 for what is sent whole."""
    if parameter.ndim != 2 or not name.startswith("resblocks."):
        return 0
    if _along(parameter) % parameter.device_mesh.size():
        return 0  # shards of unequal size, with padding in them
    rows, columns = parameter.to_local().shape
    return config.rank(rows, columns)


def _padded_size(parameter: DTensor) -> int:
    """Numbers of its shard as FSDP lays it out: as many on every rank."""
    along = _along(parameter)
    return parameter.numel() // along * -(-along // parameter.device_mesh.size())


def _along(parameter: DTensor) -> int:
    """Its size along the sharded dimension."""
    (placement,) = parameter.placements
    assert isinstance(placement, Shard)
    return parameter.shape[placement.dim]
