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

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from models.prior import Prior
from pipelines.training.late_collectives import gather_late, reduce_late
from pipelines.training.placement import is_replicated, sharded_dimension
from pipelines.training.prior_training import ShardingConfig
from pipelines.training.ranks import world_size

BETWEEN, WITHIN = "between_groups", "within_group"


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
    ranks = world_size()
    if ranks == 1:
        return None
    shards = config.shards(ranks)
    if shards == 1 and not config.power_sgd.enabled:
        return None
    mesh = init_device_mesh(
        device.type, (ranks // shards, shards), mesh_dim_names=(BETWEEN, WITHIN)
    )
    # PowerSGD reduces between the groups itself; then FSDP must not know of them.
    one_level = ranks == shards or config.power_sgd.enabled
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
        if ranks == shards and not config.power_sgd.enabled:
            # Those that are kept gathered make room one after the other in the backward pass.
            reduce_late(units, at_most=len(units) if config.keep_gathered else 2)
    return mesh


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
