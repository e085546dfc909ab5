"""What a training of the prior sends between machines, counted from its settings."""

from collections.abc import Iterator

import torch

from models.prior import Prior, PriorConfig
from pipelines.training.placement import is_replicated, sharded_dimension
from pipelines.training.prior_training import ShardingConfig


def sent_bytes(model: PriorConfig, sharding: ShardingConfig, shards: int) -> int:
    """That a worker hands to FSDP's reduction between groups in an update; fp32 but for PowerSGD's.

    `shards` are the workers of a group. A ring sends twice that, less a share, over the network.
    The resblocks' gains and biases are not among it.
    """
    whole, compressed = _shards(model, sharding, shards)
    sent = sum(sharding.power_sgd.sent_bytes(rows, columns) for rows, columns in compressed)
    return 4 * whole + sent


def vector_bytes(model: PriorConfig) -> int:
    """Of the resblocks' gains and biases, which every worker sends whole."""
    return 4 * 13 * model.n_layers * model.d_model


def compressed_shapes(
    model: PriorConfig, sharding: ShardingConfig, shards: int
) -> Iterator[tuple[int, int]]:
    """The matrices that PowerSGD compresses: the shards of them."""
    yield from _shards(model, sharding, shards)[1]


def _shards(
    model: PriorConfig, sharding: ShardingConfig, shards: int
) -> tuple[int, list[tuple[int, int]]]:
    """Numbers of a worker's shards that are sent whole, and shapes of those that are not."""
    with torch.device("meta"):
        parameters = dict(Prior(model).named_parameters())
    whole, compressed = 0, []
    for name, parameter in parameters.items():
        inside = name.startswith("resblocks.")
        if inside and is_replicated(parameter):
            continue
        dimension = sharded_dimension(parameter.shape, shards)
        shape = list(parameter.shape)
        shape[dimension] = -(-shape[dimension] // shards)
        even = parameter.shape[dimension] % shards == 0
        if inside and even and sharding.power_sgd.enabled:
            compressed.append((shape[0], shape[1]))
        else:
            whole += parameter.numel() // parameter.shape[dimension] * shape[dimension]
    return whole, compressed
