"""The training of the contrastive model. On two processes: tests/integration/test_clip_ranks.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from models.clip import ClipConfig
from models.dvae import DVAE, DVAEConfig
from pipelines.data.caption_slots import OwnSlots
from pipelines.data.crops import CropConfig
from pipelines.data.schema import FILTERED
from pipelines.data.tokenizer import CaptionTokenizer, TokenizerConfig, train_tokenizer
from pipelines.evaluation.pair_retrieval import retrieval_at_1, share_found
from pipelines.sampling.reranking import Reranker
from pipelines.training.clip_loop import train_clip
from pipelines.training.clip_trainer import ClipTrainer
from pipelines.training.clip_training import ClipCadence, ClipOptimizer, ClipTraining
from pipelines.training.pair_loader import PairBatch, PairLoader
from pipelines.training.picture_loader import PictureBatch, PictureLoader
from pipelines.training.redrawing import Redrawing
from tests.fixtures.datasets import filtered_pairs, filtered_row, write_dataset
from tests.unit.test_picture_loader import pictures

CONFIG = ClipConfig(
    image_size=16,
    patch_size=8,
    image_width=32,
    image_layers=2,
    image_heads=2,
    text_len=6,
    vocab_size=40,
    text_width=32,
    text_layers=2,
    text_heads=2,
    embed_width=16,
)
CPU = torch.device("cpu")
STEPS, BATCH = 6, 8


def training(**overrides: Any) -> ClipTraining:
    optimizer: dict[str, Any] = {"peak_lr": 3e-3, "warmup_steps": 2, "clip_norm": 1.0}
    values: dict[str, Any] = {"steps": STEPS, "batch_samples": BATCH, "precision": "fp32"}
    for name, value in overrides.items():
        (optimizer if hasattr(ClipOptimizer, name) else values)[name] = value
    return ClipTraining(**values, optimizer=ClipOptimizer(**optimizer))


def stage_one() -> DVAE:
    torch.manual_seed(0)
    return DVAE(
        DVAEConfig(
            image_size=16, vocab_size=12, n_hid=8, n_init=6, group_count=3, n_blk_per_group=1
        )
    )


def pairs(step: int, rank: int = 0, world_size: int = 1) -> PairBatch:
    """Random pairs: a function of the step; the ranks' parts are those of one batch."""
    generator = torch.Generator().manual_seed(step)
    pixels = torch.randint(256, (BATCH, 3, 16, 16), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(1, 40, (BATCH, 6), generator=generator)
    ends = torch.randint(1, 6, (BATCH,), generator=generator)
    share = BATCH // world_size
    own = slice(rank * share, (rank + 1) * share)
    return PairBatch(PictureBatch(pixels[own], step % 2), tokens[own], ends[own])


class Killed(Exception):
    pass


def run(
    path: Path,
    *,
    how: ClipTraining | None = None,
    kill_at: int = 0,
    stop_at: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Any]:
    """Train, or break off at a step, or ask the last rank to stop; what the effects were told."""
    told: dict[str, Any] = {"log": {}, "resumed": [], "judged": []}

    @contextmanager
    def batches(first: int, last: int) -> Iterator[Iterator[PairBatch]]:
        yield (pairs(step, rank, world_size) for step in range(first, last))

    def on_log(step: int, metrics: dict[str, float]) -> None:
        told["log"][step] = metrics
        if step == kill_at:
            raise Killed

    told["weights"] = train_clip(
        CONFIG,
        how or training(redrawn=0.5),
        cadence=ClipCadence(log_every=1, checkpoint_every=2, validate_every=4),
        batches=batches,
        keys=lambda step: [f"pair-{step}-{rank}-{place}" for place in range(BATCH // world_size)],
        device=CPU,
        rank=rank,
        world_size=world_size,
        stage_one=stage_one(),
        checkpoints=path / "checkpoints",
        on_log=on_log,
        on_resume=lambda step, said: told["resumed"].append((step, said)),
        on_weights=lambda step, weights: told["judged"].append(step),
        is_asked_to_stop=lambda: rank == world_size - 1 and stop_at in told["log"],
    )
    return told


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


TIMES = ("images_per_second", "data_wait", "unusable_pictures")


def check_resumed(whole: dict[str, Any], resumed: dict[str, Any]) -> None:
    assert resumed["resumed"][0][0] == 4
    assert same(whole["weights"], resumed["weights"])
    for step in (5, 6):
        rows = [told["log"][step] for told in (whole, resumed)]
        left, right = ({k: v for k, v in row.items() if k not in TIMES} for row in rows)
        assert left == right


def test_a_killed_and_resumed_training_ends_in_the_same_bits(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    assert whole["judged"] == [4, 6]
    with pytest.raises(Killed):
        run(tmp_path / "killed", kill_at=5)
    check_resumed(whole, run(tmp_path / "killed"))


def test_a_batch_is_learned_by_heart() -> None:
    trainer = ClipTrainer(CONFIG, training(steps=60, weight_decay=0.0), device=CPU)
    first = trainer.update(pairs(0))
    for _ in range(58):
        trainer.update(pairs(0))
    last = trainer.update(pairs(0))
    assert float(first.loss) > 1.0
    assert float(last.loss) < 0.2
    assert float(last.accuracy) == 1.0
    row = trainer.metrics(last, 3)
    assert row["unusable_pictures"] == 3
    assert row["batch_accuracy"] == 1.0
    assert row["lr"] == pytest.approx(training(steps=60).lr(59))


def test_the_temperature_stays_bounded_in_training() -> None:
    trainer = ClipTrainer(CONFIG, training(peak_lr=2.0, warmup_steps=0, steps=99), device=CPU)
    with torch.no_grad():
        trainer.model.logit_scale.fill_(4.6)
    for step in range(3):
        trainer.update(pairs(step))
        assert float(trainer.model.scale()) <= 100.001


def test_the_gain_and_the_temperature_do_not_decay_and_the_weights_do() -> None:
    trainer = ClipTrainer(CONFIG, training(), device=CPU)
    decayed, others = trainer.replica.optimizer.param_groups
    names = {id(value): name for name, value in trainer.model.named_parameters()}
    assert decayed["weight_decay"] == 0.2
    assert others["weight_decay"] == 0.0
    kept = {names[id(value)] for value in others["params"]}
    assert {"logit_scale", "image.class_embedding", "image.ln_pre.weight"} <= kept
    assert {names[id(value)] for value in decayed["params"]} >= {
        "text.embedding.weight",
        "image.patch_embedding.weight",
        "text.position",
    }


def test_a_stopped_training_has_a_checkpoint_and_goes_on(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    stopped = run(tmp_path / "stopped", stop_at=2)  # asked before update 3
    assert stopped["weights"] is None
    assert list(stopped["log"]) == [1, 2, 3]
    resumed = run(tmp_path / "stopped")
    assert resumed["resumed"][0][0] == 3
    assert same(whole["weights"], resumed["weights"])


def test_a_pair_that_is_not_finite_changes_no_weight_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = ClipTrainer.update

    def spoil(self: ClipTrainer, batch: PairBatch, *, stop: bool) -> Any:
        with torch.no_grad():
            self.model.text.embedding.weight[39] = float("nan")
            batch.tokens[batch.tokens == 39] = 38
            batch.tokens[2, 0] = 39
        return good(self, batch, stop=stop)

    monkeypatch.setattr(ClipTrainer, "update", spoil)
    with pytest.raises(
        RuntimeError, match=r"10 updates in a row.*pair-0-0-2, pair-1-0-2"
    ) as caught:
        run(tmp_path, how=training(steps=30))
    assert "pair-0-0-1," not in str(caught.value)


def test_the_step_size_warms_up_and_falls_to_nothing() -> None:
    how = training(steps=10, warmup_steps=4, peak_lr=1.0)
    assert [how.lr(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert how.lr(7) == pytest.approx(0.5)
    assert how.lr(9) < 0.1
    assert how.lr(10) == 0.0


def test_bf16_trains_to_nearly_the_same_loss() -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        trainer = ClipTrainer(CONFIG, training(precision=precision), device=CPU)
        losses.append([float(trainer.update(pairs(step)).loss) for step in range(4)])
    np.testing.assert_allclose(losses[0], losses[1], atol=0.05)


def test_a_share_of_each_batch_is_redrawn_the_same_on_any_ranks() -> None:
    pixels = torch.rand(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    model = stage_one()

    def redrawn(rank: int = 0, world_size: int = 1, share: float = 0.5, step: int = 0) -> Tensor:
        redraw = Redrawing(
            model, share, seed=1, batch_samples=BATCH, rank=rank, world_size=world_size
        )
        part = BATCH // world_size
        return redraw(pixels[rank * part : (rank + 1) * part], step)

    whole = redrawn()
    torch.testing.assert_close(whole, torch.cat([redrawn(0, 2), redrawn(1, 2)]))
    with torch.no_grad():
        torch.testing.assert_close(redrawn(share=1.0), model.decode(model.encode(pixels)))
    assert torch.equal(redrawn(share=0.0), pixels)
    kept = [
        sum(torch.equal(*pair) for pair in zip(redrawn(step=s), pixels, strict=True))
        for s in range(40)
    ]
    assert 0.35 < sum(kept) / (40 * BATCH) < 0.65
    assert len(set(kept)) > 1


def test_redrawing_without_a_model_to_do_it_is_refused() -> None:
    with pytest.raises(ValueError, match="redrawn must be 0 without a stage-one model"):
        ClipTrainer(CONFIG, training(redrawn=0.1), device=CPU)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch_samples": 1},
        {"clip_norm": -1.0},
        {"peak_lr": 0.0},
        {"redrawn": 1.1},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        training(**wrong)


def own_slots(captions: list[str]) -> OwnSlots:
    data = train_tokenizer(captions, TokenizerConfig(vocab_size=400))
    return OwnSlots(CaptionTokenizer(data, "test"))


@pytest.mark.parametrize("broken", [0, 7])
def test_a_picture_comes_with_its_own_caption(tmp_path: Path, broken: int) -> None:
    """Also where a broken picture gave way to the next: captions are "grey NUMBER"."""
    manifest = pictures(tmp_path, rows=60, broken=broken)
    slots = own_slots([f"grey {number}" for number in range(60)])
    reader = PairLoader(
        PictureLoader(manifest, CropConfig(), image_size=8, batch_samples=10, seed=1), slots, 12
    )
    replaced = 0
    for step in range(6):
        batch = PairBatch.unpack(reader.arrays(step))
        replaced += batch.pictures.unusable
        for pixels, tokens in zip(batch.pictures.pixels, batch.tokens, strict=True):
            assert slots.tokenizer.decode(tokens.numpy()) == f"grey {int(pixels[0, 0, 0])}"
    assert bool(replaced) == bool(broken)


def test_retrieval_counts_an_equal_caption_as_found() -> None:
    cosines = np.array([[0.1, 0.9, 0.0], [0.1, 0.9, 0.0], [0.8, 0.1, 0.2]])
    assert share_found(cosines, ["b", "b", "c"], ["b", "b", "c"]) == pytest.approx(2 / 3)


def test_retrieval_looks_at_one_split_only(tmp_path: Path) -> None:
    rows = filtered_pairs(tmp_path / "all", rows=40)
    table = pa.concat_tables(rows.tables()).to_pylist()
    mixed = [
        filtered_row(row["caption"], row["image"])
        | {"split": "train" if place < 30 else "validation"}
        for place, row in enumerate(table)
    ]
    manifest = write_dataset(
        tmp_path / "split",
        "filter_pairs",
        pa.Table.from_pylist(mixed, schema=FILTERED),
        inputs={},
        rows_per_shard=40,
    )
    slots = own_slots([row["caption"] for row in table])
    config = ClipConfig(**{**vars(CONFIG), "vocab_size": 400, "text_len": 16})
    trainer = ClipTrainer(config, training(), device=CPU)
    figures = retrieval_at_1(Reranker(trainer.model, slots), manifest, split="validation", pairs=10)
    assert figures["validation_retrieval_pairs"] == 10
    assert 0 <= figures["validation_image_to_text_at_1"] <= 1
    assert 0 <= figures["validation_text_to_image_at_1"] <= 1
