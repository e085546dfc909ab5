"""jobs.train_dvae and jobs.train_vqvae, end to end on a real Ray."""

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import runtime, train_dvae, train_vqvae
from pipelines.data.stage import Manifest
from pipelines.data.storage import sha256_file
from pipelines.training.checkpoint_files import attempts, is_complete
from pipelines.training.weights import load_stage_one
from tests.fixtures.datasets import filtered_pairs
from tests.fixtures.processes import processes_named
from tests.fixtures.sigterm import run_until_sigterm

pytestmark = pytest.mark.usefixtures("ray_cluster")
STEPS = 4
VERBS: dict[str, Callable[[list[str]], int]] = {
    "dvae": train_dvae.main,
    "vqvae": train_vqvae.main,
}


@pytest.fixture(scope="module")
def filtered(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return filtered_pairs(tmp_path_factory.mktemp("pairs") / "filtered", rows=48)


def arguments(kind: str, filtered: Manifest, output: Path, *more: str) -> list[str]:
    return [
        "tiny",
        f"--filtered={filtered.path}",
        f"--output={output}",
        f"--training.steps={STEPS}",
        "--cadence.log-every=2",
        "--cadence.checkpoint-every=2",
        f"--{kind}.n-hid=8",
        *more,
    ]


def summary(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    line: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return line


@pytest.mark.parametrize("kind", ["dvae", "vqvae"])
def test_a_trained_model_is_kept_with_its_record_and_not_trained_again(
    kind: str, filtered: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = arguments(kind, filtered, tmp_path / kind)
    assert VERBS[kind](line) == 0
    first = summary(capsys)
    file = tmp_path / kind / f"{kind}.safetensors"
    assert first["sha256"] == sha256_file(file)
    assert first["steps"] == STEPS
    model, metadata = load_stage_one(file)
    assert metadata["filtered_digest"] == filtered.digest
    assert model.encode(torch.rand(1, 3, 64, 64)).shape == (1, 8, 8)
    rows = [json.loads(line) for line in (tmp_path / kind / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [2, 4]
    assert {"hard_elb", "reconstruction", "kl", "perplexity", "codes_used"} <= set(rows[-1])
    check_pictures(tmp_path / kind)
    assert VERBS[kind](line) == 0
    out = capsys.readouterr().out
    assert "nothing to do" in out
    assert json.loads(out.splitlines()[-1])["sha256"] == first["sha256"]
    assert VERBS[kind]([*line, "--training.seed=1"]) == 2


def check_pictures(output: Path) -> None:
    """What the MLflow UI shows of the run: reconstructions and the codebook's use."""
    from mlflow import MlflowClient

    run = json.loads((output / ".mlflow_run.json").read_text())
    client = MlflowClient(tracking_uri=run["uri"])
    names = [Path(image.path).name for image in client.list_artifacts(run["run_id"], "images")]
    for key in ("reconstructions", "codebook"):
        assert [name for name in names if name.startswith(key)], names
    assert client.get_metric_history(run["run_id"], "perplexity")[-1].step == STEPS


def test_pictures_from_actors_and_from_a_thread_train_the_same_model(
    filtered: Manifest, tmp_path: Path
) -> None:
    """And so do those of an actor that was killed: Ray starts another, batches have numbers."""
    longer = ("--training.steps=24", "--cadence.checkpoint-every=24")
    line = arguments("dvae", filtered, tmp_path / "killed", *longer)
    killed = threading.Event()
    killer = threading.Thread(target=kill_a_reader, args=(tmp_path / "killed", killed))
    killer.start()
    assert train_dvae.main(line) == 0
    killer.join()
    assert killed.is_set()
    line = arguments("dvae", filtered, tmp_path / "thread", *longer)
    assert train_dvae.main([*line, "--loaders.per-worker=0"]) == 0
    files = [tmp_path / name / "dvae.safetensors" for name in ("killed", "thread")]
    assert sha256_file(files[0]) == sha256_file(files[1])


def kill_a_reader(output: Path, killed: threading.Event) -> None:
    """Wait for the first metrics, then kill one of the actors that make batches."""
    for _ in range(600):
        if (output / "metrics.jsonl").exists() and (pids := processes_named("(BatchReader)")):
            os.kill(pids[0], signal.SIGKILL)
            killed.set()
            return
        threading.Event().wait(0.1)  # polling for the first metrics


def test_a_driver_that_is_told_to_end_stops_after_a_checkpoint(
    filtered: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "dvae"
    line = arguments("dvae", filtered, out, "--training.steps=100000", "--loaders.per-worker=1")
    assert run_until_sigterm(train_dvae.main, line, out / "metrics.jsonl") == runtime.STOPPED
    assert "run the same line again" in capsys.readouterr().out
    assert is_complete(attempts(out / "checkpoints")[0])
    assert not (out / "dvae.safetensors").exists()


def test_too_few_processors_are_said_before_anything_starts(
    filtered: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = arguments("dvae", filtered, tmp_path / "dvae", "--loaders.per-worker=9")
    assert train_dvae.main(line) == 2
    assert "must have 20 CPUs for 2 workers and 9 loaders" in capsys.readouterr().err
