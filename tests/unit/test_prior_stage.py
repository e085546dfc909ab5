"""One worker's part of training the prior, without Ray: what it leaves, stopped and resumed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from models.prior import PriorConfig
from pipelines.training.mlflow_run import run_id_of
from pipelines.training.prior_stage import ODD_FILE, PRIOR_FILE, PriorStage, run_prior_stage
from pipelines.training.prior_training import Cadence
from pipelines.training.run_directory import read_result
from pipelines.training.stopping import StopRequest
from pipelines.training.tracking import TrackingConfig, open_run
from pipelines.training.watchdog import WatchdogConfig
from tests.fixtures.datasets import tiny_tokens
from tests.fixtures.tiny_training import tiny_training

CPU = torch.device("cpu")
STEPS = 6


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> PriorStage:
    path = tmp_path_factory.mktemp("data")
    tiny = tiny_tokens(path, rows=24, grid=4, image_vocab_size=32, held_out=4)
    return PriorStage(
        output=path / "prior",
        tokens=tiny.tokens,
        tokenizer=tiny.tokenizer,
        dvae=tiny.dvae,
        prior=PriorConfig(
            n_layers=1,
            n_heads=2,
            d_model=16,
            text_len=12,
            text_vocab_size=512,
            grid=4,
            image_vocab_size=32,
            conv_kernel=3,
        ),
        training=tiny_training(steps=STEPS, batch_samples=4),
        cadence=Cadence(log_every=2, checkpoint_every=2, sample_every=100, validate_every=3),
        tracking_uri=f"sqlite:///{path}/mlflow.db",
        watchdog=WatchdogConfig(patience_seconds=300),
    )


def rows_of(stage: PriorStage) -> list[dict[str, Any]]:
    return [json.loads(row) for row in (stage.output / "metrics.jsonl").read_text().splitlines()]


def steps_with(stage: PriorStage, name: str) -> list[int]:
    return [row["step"] for row in rows_of(stage) if name in row]


def test_a_training_that_was_stopped_goes_on_and_mlflow_has_every_look_once(
    stage: PriorStage,
) -> None:
    stage.output.mkdir()
    request = StopRequest(stage.output)
    with open_run(
        TrackingConfig(experiment="stage"),
        stage="train_prior",
        settings={},
        tags={},
        directory=stage.output,
        uri=stage.tracking_uri,
    ):
        request.ask()
        run_prior_stage(stage, device=CPU)
        assert not (stage.output / PRIOR_FILE).exists()
        assert "stopped, as it was asked to" in rows_of(stage)[-1]["notice"]
        request.forget()
        run_prior_stage(stage, device=CPU)
    assert (stage.output / PRIOR_FILE).exists()
    said = [row["notice"] for row in rows_of(stage) if "notice" in row]
    assert any(notice.startswith("resumed after step 1") for notice in said)
    assert not any("validation rows" in notice for notice in said)
    assert steps_with(stage, "loss") == [2, 4, 6]
    assert steps_with(stage, "validation.image_loss") == [3, 6]
    assert {"validation.text_loss", "validation.average.image_loss"} <= read_result(
        stage.output
    ).keys()
    client, run_id = MlflowClient(stage.tracking_uri), run_id_of(stage.output)
    history = client.get_metric_history(run_id, "validation.average.text_loss")
    assert [point.step for point in history] == [3, 6]
    names = [file.path for file in client.list_artifacts(run_id, "images")]
    assert any("samples" in name for name in names)
    assert not (stage.output / ODD_FILE).exists()


def test_an_update_that_is_not_finite_names_its_samples(
    stage: PriorStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Poisoned in one update; the training goes on."""
    from pipelines.training.prior_trainer import PriorTrainer

    real = PriorTrainer._backward

    def poisoned(self: PriorTrainer, batch: Any) -> torch.Tensor:
        return real(self, batch) * (float("nan") if self.step == 2 else 1.0)

    monkeypatch.setattr(PriorTrainer, "_backward", poisoned)
    run_prior_stage(replace(stage, output=tmp_path, tracking_uri=""), device=CPU)
    (line,) = (tmp_path / ODD_FILE).read_text().splitlines()
    odd = json.loads(line)
    assert (odd["step"], odd["why"]) == (3, "its loss is nan")
    assert len(set(odd["keys"])) == 4
    notices = [row["notice"] for row in rows_of(replace(stage, output=tmp_path)) if "notice" in row]
    assert any("update 3 is odd: its loss is nan" in notice for notice in notices)
