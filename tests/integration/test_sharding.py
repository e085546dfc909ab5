"""The prior over several processes: groups of shards and replicas, precision, recomputation."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.prior import Prior, PriorConfig, count_parameters
from pipelines.training.parallelize import build_prior
from pipelines.training.prior_training import Recompute, ShardingConfig
from tests.fixtures.allocation import peak_bytes
from tests.fixtures.ranks import on_ranks
from tests.fixtures.tiny_training import tiny_batch, tiny_training, train_tiny

UPDATES = 3
HYBRID = ShardingConfig(group_size=2)
REPLICAS = ShardingConfig(group_size=1)
LAYOUTS: dict[str, dict[str, Any]] = {
    "one group": {"sharding": ShardingConfig(group_size=4)},
    "one group kept gathered": {"sharding": ShardingConfig(group_size=4, keep_gathered=True)},
    "two groups": {"sharding": HYBRID},
    "four replicas": {"sharding": REPLICAS},
    "replicas' micro-batches": {"sharding": REPLICAS, "micro_batches": 2},
    "replicas full": {"sharding": REPLICAS, "recompute": "full"},
    "kept gathered": {"sharding": replace(HYBRID, keep_gathered=True)},
    "micro-batches": {"sharding": HYBRID, "micro_batches": 2},
    "selective": {"sharding": HYBRID, "recompute": "selective"},
    "full": {"sharding": HYBRID, "recompute": "full"},
    "bf16": {"sharding": HYBRID, "precision": "bf16"},
    "bf16 selective": {"sharding": HYBRID, "precision": "bf16", "recompute": "selective"},
    "bf16 replicas": {"sharding": REPLICAS, "precision": "bf16"},
    "bf16 full": {"sharding": HYBRID, "precision": "bf16", "recompute": "full"},
}


def _train_all() -> dict[str, dict[str, Any]]:
    return {
        name: train_tiny(tiny_training(**how), UPDATES, batches=UPDATES)
        for name, how in LAYOUTS.items()
    }


@pytest.fixture(scope="module")
def on_four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    trained: dict[str, dict[str, Any]] = on_ranks(_train_all, 4, tmp_path_factory.mktemp("four"))
    return trained


def alone(**how: Any) -> dict[str, Any]:
    return train_tiny(tiny_training(**how), UPDATES, batches=UPDATES)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if not name.startswith("bf16")])
def test_four_processes_train_like_one_in_fp32(
    layout: str, on_four: dict[str, dict[str, Any]]
) -> None:
    one, four = alone(), on_four[layout]
    torch.testing.assert_close(four["losses"], one["losses"], rtol=1e-5, atol=0)
    torch.testing.assert_close(four["norms"], one["norms"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("layout", ["bf16", "bf16 replicas"])
def test_weights_gathered_in_16_bits_give_what_autocast_gives(
    layout: str, on_four: dict[str, dict[str, Any]]
) -> None:
    one, four = alone(precision="bf16"), on_four[layout]
    # The first update's loss is the same numbers through the same products, whatever bf16 rounds.
    assert four["losses"][0] == pytest.approx(float(one["losses"][0]), rel=1e-6)
    torch.testing.assert_close(four["losses"], one["losses"], rtol=2e-3, atol=0)


@pytest.mark.parametrize("precision", ["", "bf16 "])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_sharded_recomputation_changes_no_bit(
    precision: str, recompute: str, on_four: dict[str, dict[str, Any]]
) -> None:
    kept = on_four[precision.strip() or "two groups"]
    recomputed = on_four[precision + recompute]
    assert torch.equal(kept["losses"], recomputed["losses"])
    assert all(torch.equal(kept["weights"][k], recomputed["weights"][k]) for k in kept["weights"])


def test_workers_that_are_no_whole_number_of_groups_are_refused() -> None:
    assert ShardingConfig(group_size=8).shards(4) == 4
    assert ShardingConfig(group_size=8).shards(16) == 8
    with pytest.raises(ValueError, match="12 workers and groups of 8"):
        ShardingConfig(group_size=8).shards(12)


WIDE = PriorConfig(
    n_layers=4, n_heads=4, d_model=256, text_len=32, text_vocab_size=512, grid=8,
    image_vocab_size=128, conv_kernel=3,
)  # fmt: skip


def _build_wide() -> int:
    return peak_bytes(
        lambda: build_prior(
            WIDE,
            device=torch.device("cpu"),
            seed=0,
            recompute="full",
            sharding=ShardingConfig(group_size=2),
            branch_dtype=torch.bfloat16,
        )
    )


def test_a_rank_never_holds_more_than_its_shard_and_one_parameter(tmp_path: Path) -> None:
    peak = on_ranks(_build_wide, 2, tmp_path)
    largest = 4 * WIDE.d_model**2
    shard = count_parameters(WIDE) // 2
    assert 4 * shard < peak < 1.02 * 4 * (shard + 2 * largest)


class SavedBytes:
    """Bytes that autograd keeps of a forward pass, each storage once; parameters not counted."""

    def __init__(self, prior: Prior) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in prior.parameters()}
        self.kept: dict[int, Tensor] = {}

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.kept[storage.data_ptr()] = tensor
        return tensor

    @property
    def total(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.kept.values())


def _kept_and_flops(recompute: Recompute, n_layers: int) -> tuple[int, dict[Any, int]]:
    """Bytes kept of a forward pass in bf16, and FLOP by operator of both passes."""
    config = replace(WIDE, n_layers=n_layers)
    prior, _ = build_prior(
        config,
        device=torch.device("cpu"),
        seed=0,
        recompute=recompute,
        sharding=ShardingConfig(),
        branch_dtype=torch.bfloat16,
    )
    batch = tiny_batch(0, config, samples=2)
    saved = SavedBytes(prior)
    with FlopCounterMode(display=False) as flops:
        with (
            torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16),
        ):
            loss = prior(batch.text_tokens, batch.image_tokens).total
        loss.backward()
    return saved.total, dict(flops.get_flop_counts()["Global"])


def test_recomputation_keeps_less_and_selectively_repeats_no_large_product() -> None:
    stream = 2 * WIDE.stream_len * WIDE.d_model  # numbers of (B, T, C)
    kept, heads = {}, {}
    for recompute in get_args(Recompute):
        four, flops = _kept_and_flops(recompute, 4)
        two, _ = _kept_and_flops(recompute, 2)
        kept[recompute] = (four - two) // 2  # of a layer: two resblocks
        products = flops[torch.ops.aten.addmm] + flops[torch.ops.aten.mm]
        layers = 6 * 12 * WIDE.d_model**2 * 4 * 2 * WIDE.stream_len
        # A block's last product is not made again by either: 7 of 12 d² are, of three passes.
        heads[recompute] = products - layers * (1 + 7 / 36 * (recompute == "full"))
    assert len(set(heads.values())) == 1
    assert 0 < heads["none"] < 0.2 * layers
    # The stream in fp32 before each resblock; then, in bf16, what the first linear layers made.
    assert kept["full"] == 2 * 4 * stream
    assert kept["selective"] == 2 * 4 * stream + 2 * (3 + 4) * stream
    assert kept["none"] > 1.5 * kept["selective"]
