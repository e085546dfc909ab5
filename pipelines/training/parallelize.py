"""Building a prior over many processes: meta → recompute → shard → materialise → initialise."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from models.prior import Prior, PriorConfig, Resblock, initial_values
from models.resblock_scaling import ResblockScales
from pipelines.training.gradient_means import GradientMeans
from pipelines.training.power_sgd import PowerSGD
from pipelines.training.prior_training import Recompute, ShardingConfig
from pipelines.training.ranks import world_size
from pipelines.training.sharding import BETWEEN, shard_prior

WRAPPER = "_checkpoint_wrapped_module."
ALONE = ShardingConfig()


def build_prior(
    config: PriorConfig,
    *,
    device: torch.device,
    seed: int,
    recompute: Recompute,
    sharding: ShardingConfig = ALONE,
    branch_dtype: torch.dtype | None = None,
) -> tuple[Prior, PowerSGD | None]:
    """A prior with its initial weights, sharded over the ranks if there are several.

    With it what compresses its gradients between groups of ranks, if something does. The weights
    are a function of the seed alone, whatever the number of ranks. None of them is ever whole on a
    rank but one at a time, while its shard is cut out. `branch_dtype` is the 16-bit precision of
    the branches, None for fp32.
    """
    with torch.device("meta"):
        prior = Prior(config)
    for index, resblock in enumerate(prior.resblocks):
        assert isinstance(resblock, Resblock)
        resblock.recomputes = recompute == "selective"
        if recompute == "full":
            prior.resblocks[index] = checkpoint_wrapper(resblock)
    mesh = shard_prior(prior, sharding, device=device, branch_dtype=branch_dtype)
    prior.to_empty(device=device)
    names = dict(plain_named_parameters(prior))
    with torch.no_grad():
        for name, value in initial_values(names, config, seed):
            _assign(names[name], value)
    if mesh is None or not sharding.power_sgd.enabled:
        return prior, None
    return prior, PowerSGD(_units(prior), sharding.power_sgd, mesh.get_group(BETWEEN), seed)


def _units(prior: Prior) -> Iterator[tuple[FSDPModule, dict[str, nn.Parameter]]]:
    """FSDP's units, each with its own parameters in its order."""
    names = {parameter: name for name, parameter in plain_named_parameters(prior)}
    for module in reversed(list(prior.modules())):  # a unit within another before it
        if isinstance(module, FSDPModule):
            own = [p for p in module.parameters() if p in names and isinstance(p, DTensor)]
            yield module, {names.pop(p): p for p in own}


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


def mean_over_ranks(values: Tensor) -> Tensor:
    """A small tensor's mean; `values` is not to be used again."""
    if world_size() == 1:
        return values
    dist.all_reduce(values)  # gloo has no average
    return values / world_size()


def gradient_means(prior: Prior) -> GradientMeans:
    """Of the parameters that are whole on every rank, which FSDP does not know of."""
    alone = world_size() == 1
    whole = [p for p in prior.parameters() if not alone and not isinstance(p, DTensor)]
    # Beside shards they are few.
    return GradientMeans(whole, messages=1 if isinstance(prior, FSDPModule) else 4)


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
