"""How the prior's weights lie on the workers: FSDP2, a unit a resblock.

Workers are cut into groups of `group_size`, in the order of their ranks: those of a machine. A
group holds the weights once, each worker a shard; the groups are replicas of each other (paper,
section 2.5). With one group only that is plain FSDP, with several it is hybrid sharding. In groups
of one nothing is sharded: the workers send each other gradients and nothing else
(`gradient_means.py`).

In 16 bits the matrices of a resblock are cast before they are gathered, where autocast would cast
them after: the same numbers at half the traffic. Gradients are reduced in fp32 whatever their
precision: a sum over a thousand 16-bit gradients loses their last bits. Gains and biases of
resblocks, 3 in 10,000 of the 12B's parameters, are whole on every worker, in fp32 as the paper
keeps them (appendix D.2), and their gradients are reduced in one message.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from models.prior import Prior
from pipelines.training.late_collectives import gather_late, reduce_late
from pipelines.training.power_sgd import PowerSGDConfig

BETWEEN, WITHIN = "between_groups", "within_group"


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """Where weights, gradients and the optimizer's state lie. The defaults are the paper's."""

    group_size: int = 8
    """Workers that hold the weights once between them: those of a machine. Further workers are
    replicas; fewer workers are one group. 1 sends gradients and nothing else, if every
    worker has room for the whole model."""
    keep_gathered: bool = False
    """Keep a resblock's gathered weights from the forward to the backward pass: a third fewer
    messages, for all of the weights in every worker's memory. The paper drops them at once."""
    power_sgd: PowerSGDConfig = field(default_factory=PowerSGDConfig)

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")

    def shards(self, world_size: int) -> int:
        """Workers that hold the weights once between them.

        Raises ValueError if the workers are not a whole number of groups.
        """
        shards = min(self.group_size, world_size)
        if world_size % shards:
            raise ValueError(
                f"the number of workers must divide by sharding.group_size, got {world_size} "
                f"workers and groups of {shards}: change either"
            )
        return shards


def shard_prior(
    prior: Prior,
    config: ShardingConfig,
    *,
    device: torch.device,
    branch_dtype: torch.dtype | None,
) -> DeviceMesh | None:
    """Shard over the ranks, if there are several; the mesh of all ranks, (groups, shards).

    None if every rank is to have the weights whole.

    `branch_dtype` is the precision that weights of resblocks are gathered in; None for fp32.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    world_size = dist.get_world_size()
    shards = config.shards(world_size)
    if shards == 1 and not config.power_sgd.enabled:
        return None
    mesh = init_device_mesh(
        device.type, (world_size // shards, shards), mesh_dim_names=(BETWEEN, WITHIN)
    )
    # PowerSGD reduces between the groups itself; then FSDP must not know of them.
    one_level = world_size == shards or config.power_sgd.enabled
    used = mesh[WITHIN] if one_level else mesh

    def place(parameter: nn.Parameter) -> Shard:
        return Shard(sharded_dimension(parameter.shape, shards))

    branches = MixedPrecisionPolicy(
        param_dtype=branch_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    vectors = {parameter for parameter in prior.resblocks.parameters() if is_replicated(parameter)}
    for resblock in prior.resblocks:
        fully_shard(
            resblock,
            mesh=used,
            reshard_after_forward=not config.keep_gathered,
            shard_placement_fn=place,
            mp_policy=branches,
            ignored_params=vectors,
        )
    fully_shard(
        prior,
        mesh=used,
        reshard_after_forward=not config.keep_gathered,
        ignored_params=vectors,
    )
    on_cpu = device.type == "cpu"
    _prefetch(prior, all_at_once=on_cpu and config.keep_gathered)
    if on_cpu:
        units = [module for module in prior.modules() if isinstance(module, FSDPModule)]
        gather_late(units)
        if world_size == shards and not config.power_sgd.enabled:
            # Those that are kept gathered make room one after the other in the backward pass.
            reduce_late(units, at_most=len(units) if config.keep_gathered else 2)
    return mesh


def is_replicated(parameter: Tensor) -> bool:
    """Whether a resblock's parameter is whole on every worker: gains and biases."""
    return parameter.ndim == 1


def sharded_dimension(shape: Sequence[int], shards: int) -> int:
    """The MLP's second matrix (C, 4C) along its longer side, so that shards are nearer a square.

    All others along their rows, which are as many as their columns or more. A square compresses
    best: an (m, n) matrix of rank r is sent as r(m + n) numbers.
    """
    return int(len(shape) == 2 and shape[1] > shape[0] and shape[1] % shards == 0)


def _prefetch(prior: Prior, *, all_at_once: bool) -> None:
    """Gather the next resblock while one computes, in both directions (paper, section 2.5).

    Or all of them before the first, if all will be there in the end: nobody waits for them then.
    """
    if all_at_once:
        assert isinstance(prior, FSDPModule)
        prior.set_modules_to_forward_prefetch(list(prior.resblocks))  # type: ignore[arg-type]
        return
    for before, after in itertools.pairwise(prior.resblocks):
        assert isinstance(before, FSDPModule)
        assert isinstance(after, FSDPModule)
        before.set_modules_to_forward_prefetch([after])
        after.set_modules_to_backward_prefetch([before])
