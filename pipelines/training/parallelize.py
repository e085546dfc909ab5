"""Building a prior over many processes: meta → recompute → shard → materialise → initialise."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from models.prior import Prior, PriorConfig, initial_values
from models.resblock_scaling import ResblockScales

WRAPPER = "_checkpoint_wrapped_module."


def build_prior(
    config: PriorConfig,
    *,
    device: torch.device,
    seed: int,
    recompute: bool,
    keep_gathered: bool = False,
) -> Prior:
    """A prior with its initial weights, sharded over the ranks if there are several.

    The weights are a function of the seed alone, whatever the number of ranks. Sharding is FSDP2, a
    unit a resblock: the unit of the gradient scales, so that a block's check is local to a rank's
    shards.
    """
    with torch.device("meta"):
        prior = Prior(config)
    if recompute:
        for index, resblock in enumerate(prior.resblocks):
            prior.resblocks[index] = checkpoint_wrapper(resblock)
    if dist.is_initialized() and dist.get_world_size() > 1:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for resblock in prior.resblocks:
            fully_shard(resblock, mesh=mesh, reshard_after_forward=not keep_gathered)
        fully_shard(prior, mesh=mesh, reshard_after_forward=not keep_gathered)
    prior.to_empty(device=device)
    names = dict(plain_named_parameters(prior))
    with torch.no_grad():
        for name, value in initial_values(names, config, seed):
            _assign(names[name], value)
    return prior


def attach_scales(prior: Prior, scales: ResblockScales) -> None:
    """Give every resblock the view of its own scale."""
    for index, resblock in enumerate(prior.resblocks):
        inner = getattr(resblock, "_checkpoint_wrapped_module", resblock)
        inner.gradient_scale = scales.values[index]


def resblock_gradients(prior: Prior) -> list[list[Tensor]]:
    """Every resblock's gradients: a rank's own shards of them."""
    return [
        [local(parameter.grad) for parameter in resblock.parameters() if parameter.grad is not None]
        for resblock in prior.resblocks
    ]


def plain_named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by the names that an unwrapped model has."""
    for name, parameter in model.named_parameters():
        yield name.replace(WRAPPER, ""), parameter


def local(tensor: Tensor) -> Tensor:
    """A rank's own shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole tensor; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def all_reduce(op: str) -> Callable[[Tensor], Tensor]:
    """The reduction of a small tensor over the ranks: "max" or "avg"."""

    def reduce(values: Tensor) -> Tensor:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return values
        # gloo has no average.
        dist.all_reduce(values, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
        return values if op == "max" else values / dist.get_world_size()

    return reduce


def _assign(parameter: nn.Parameter, value: Tensor) -> None:
    if isinstance(parameter, DTensor):
        # Every rank has made the same value, so each takes its own part and nothing is sent.
        value = distribute_tensor(
            value.to(parameter.device),
            parameter.device_mesh,
            parameter.placements,
            src_data_rank=None,
        )
    parameter.copy_(value)
