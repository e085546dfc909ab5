"""One worker's part of training stage one, without Ray: what it leaves, stopped and resumed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.progress import FollowMetrics
from models.dvae import DVAEConfig
from models.dvae_objective import DVAESchedule
from pipelines.data.stage import Manifest
from pipelines.training.checkpoint_files import attempts, is_complete
from pipelines.training.picture_loader import PictureBatch, prefetch
from pipelines.training.run_directory import read_result
from pipelines.training.stage_one_stage import StageOneStage, run_stage_one
from pipelines.training.stage_one_training import DVAETraining, StageOneCadence
from pipelines.training.stopping import StopRequest
from pipelines.training.tracking import METRICS_FILE
from pipelines.training.watchdog import WatchdogConfig
from tests.fixtures.datasets import filtered_pairs


def run(stage: StageOneStage) -> list[dict[str, Any]]:
    """The rows that it leaves in metrics.jsonl."""
    loader = stage.source.loader(0, 1)

    def batches(first: int, last: int) -> Any:
        return prefetch(lambda step: PictureBatch.unpack(loader.arrays(step)), first, last)

    run_stage_one(stage, batches=batches, device=torch.device("cpu"))
    return [json.loads(row) for row in (stage.output / "metrics.jsonl").read_text().splitlines()]


def stage_in(path: Path, vocab_size: int = 12) -> StageOneStage:
    pairs: Manifest = filtered_pairs(path / "filtered", rows=8)
    config = DVAEConfig(
        image_size=16, vocab_size=vocab_size, n_hid=8, n_init=6, group_count=3, n_blk_per_group=1
    )
    return StageOneStage(
        output=path / "dvae",
        filtered=pairs.path,
        config=config,
        training=DVAETraining(steps=3, batch_samples=2, precision="fp32"),
        cadence=StageOneCadence(log_every=1, checkpoint_every=100, images_every=3),
        tracking_uri="",
        watchdog=WatchdogConfig(patience_seconds=300),
    )


def test_a_collapsed_codebook_is_said_loudly_and_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Of so many codes, two pictures can use a few: under one in a hundred.
    stage = stage_in(tmp_path, vocab_size=8192)
    schedule = DVAESchedule(beta_steps=1)  # until its end no codebook counts as collapsed
    training = DVAETraining(steps=3, batch_samples=2, precision="fp32", schedule=schedule)
    with FollowMetrics(stage.output / METRICS_FILE, "train_dvae", 3, ("hard_elb",)):
        rows = run(replace(stage, training=training))
    assert capsys.readouterr().out.count("THE CODEBOOK HAS COLLAPSED") == 1
    (said,) = [row["notice"] for row in rows if "notice" in row]
    assert "THE CODEBOOK HAS COLLAPSED" in said
    assert [row["codebook_collapsed"] for row in rows if "notice" not in row] == [0.0, 1.0, 1.0]


def test_a_training_that_is_asked_to_stop_leaves_a_checkpoint_and_goes_on(tmp_path: Path) -> None:
    stage = stage_in(tmp_path)
    request = StopRequest(stage.output)
    stage.output.mkdir()
    request.ask()
    rows = run(stage)
    assert rows[-1]["notice"] == "stopped, as it was asked to, after a checkpoint"
    assert not stage.model_file.exists()
    assert [is_complete(path) for path in attempts(stage.output / "checkpoints")] == [True]
    request.forget()
    rows = run(stage)
    assert stage.model_file.exists()
    assert [row["step"] for row in rows if "hard_elb" in row] == [1, 2, 3]
    assert any("resumed after step 1" in row.get("notice", "") for row in rows)
    result = read_result(stage.output)
    assert result["steps"] == 3
    assert result["hard_elb"] == round(rows[-1]["hard_elb"], 5)
    beat = json.loads((stage.output / ".heartbeats" / "rank-0.json").read_bytes())
    assert beat["begun"] >= 1  # written as the watchdog begins to look
