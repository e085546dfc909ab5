"""What a training of the prior sends between machines, counted from its settings."""

import torch

from models.prior import Prior, PriorConfig
from pipelines.training.sharding import ShardingConfig, is_replicated, sharded_dimension


def sent_bytes(model: PriorConfig, sharding: ShardingConfig, shards: int) -> int:
    """That a worker hands to FSDP's reduction between groups in an update; fp32 but for PowerSGD's.

    `shards` are the workers of a group. A ring sends twice that, less a share, over the network.
    The resblocks' gains and biases are not among it.
    """
    with torch.device("meta"):
        parameters = dict(Prior(model).named_parameters())
    total = 0
    for name, parameter in parameters.items():
        inside = name.startswith("resblocks.")
        if inside and is_replicated(parameter):
            continue
        dimension = sharded_dimension(parameter.shape, shards)
        along = parameter.shape[dimension]
        if sharding.power_sgd.enabled and inside and along % shards == 0:
            shape = list(parameter.shape)
            shape[dimension] //= shards
            total += sharding.power_sgd.sent_bytes(shape[0], shape[1])
        else:
            total += 4 * parameter.numel() // along * -(-along // shards)
    return total
