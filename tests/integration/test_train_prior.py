"""jobs.train_prior on a real Ray: two FSDP2 workers, MLflow, refusals."""

import json
import re
from pathlib import Path

import pytest
from mlflow import MlflowClient

from jobs import runtime, train_prior
from pipelines.training.checkpoint_files import attempts, is_complete, read_progress
from pipelines.training.mlflow_run import run_id_of
from pipelines.training.weights import load_prior
from tests.fixtures.datasets import TinyTokens, tiny_tokens
from tests.fixtures.sigterm import run_until_sigterm

pytestmark = pytest.mark.usefixtures("ray_cluster")
STEPS = 12


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyTokens:
    return tiny_tokens(tmp_path_factory.mktemp("tokens"), rows=40)


def arguments(tiny: TinyTokens, output: Path, *more: str) -> list[str]:
    return [
        "tiny",
        f"--tokens={tiny.tokens}",
        f"--tokenizer={tiny.tokenizer}",
        f"--dvae={tiny.dvae}",
        f"--output={output}",
        "--prior.n-layers=2",
        "--prior.d-model=48",
        f"--training.steps={STEPS}",
        "--cadence.log-every=4",
        "--cadence.checkpoint-every=4",
        "--cadence.ask-every=4",
        "--cadence.sample-every=8",
        *more,
    ]


def test_two_workers_train_a_prior_and_a_second_run_does_nothing(
    tiny: TinyTokens, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "prior"
    assert train_prior.main(arguments(tiny, out)) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert first["steps"] == STEPS
    prior, metadata = load_prior(out / "prior.safetensors")
    assert prior.config.n_layers == 2
    assert set(metadata) >= {"tokenizer_sha256", "dvae_sha256", "tokens_digest"}

    run = MlflowClient(runtime.tracking_uri()).get_run(run_id_of(out))
    assert run.info.status == "FINISHED"
    assert {"text_loss", "image_loss", "gradient_scale_log2.mean"} <= set(run.data.metrics)
    assert run.data.tags["tokens_digest"] == metadata["tokens_digest"]
    pictures = MlflowClient(runtime.tracking_uri()).list_artifacts(run.info.run_id, "images")
    steps = {int(re.findall(r"step\D(\d+)", file.path)[0]) for file in pictures}
    assert steps == {8, STEPS}
    names = {Path(file.path).name for file in pictures}
    for key in ("samples", "resblocks"):
        assert any(name.startswith(key) for name in names), key

    assert train_prior.main(arguments(tiny, out)) == 0
    again = capsys.readouterr().out.splitlines()
    assert "nothing to do" in again[0]
    assert json.loads(again[-1])["sha256"] == first["sha256"]

    layout = ("--training.recompute=full", "--training.sharding.group-size=2")
    assert train_prior.main(arguments(tiny, out, *layout, "--training.micro-batches=2")) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert train_prior.main(arguments(tiny, out, "--training.seed=1")) == 2
    assert re.search(r'\+ +"seed": 1', capsys.readouterr().err)


def test_a_driver_that_is_told_to_end_stops_after_a_checkpoint(
    tiny: TinyTokens, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "prior"
    metrics = out / "metrics.jsonl"
    line = arguments(tiny, out, "--training.steps=100000")
    code = run_until_sigterm(train_prior.main, line, metrics)
    assert code == runtime.STOPPED
    assert "run the same line again" in capsys.readouterr().out
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert "stopped, as it was asked to" in rows[-1]["notice"]
    newest = attempts(out / "checkpoints")[0]
    assert is_complete(newest)
    assert read_progress(newest)["step"] >= max(row["step"] for row in rows if "loss" in row)
    assert not (out / "prior.safetensors").exists()


def test_training_goes_on_without_mlflow(
    tiny: TinyTokens,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the discard port: refused
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    out = tmp_path / "prior"
    assert train_prior.main(arguments(tiny, out, "--workers.num-workers=1")) == 0
    assert "going on without it" in capsys.readouterr().err
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [4, 8, 12]
    said = [row["notice"] for row in rows if "notice" in row]
    assert len(said) == 1
    assert "no validation rows" in said[0]
    assert (out / "prior.safetensors").exists()


def test_shards_of_another_dvae_are_refused_and_nothing_is_written(
    tiny: TinyTokens, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_tokens(tmp_path / "other", rows=12, image_vocab_size=64)
    out = tmp_path / "prior"
    assert train_prior.main(arguments(tiny, out, f"--dvae={other.dvae}")) == 2
    said = capsys.readouterr().err
    assert "was made with dvae" in said
    assert not out.exists()


def test_more_workers_than_processors_are_refused(
    tiny: TinyTokens, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--workers.num-workers=64", "--training.batch-samples=64")
    assert train_prior.main(arguments(tiny, tmp_path / "prior", *more)) == 2
    assert "64 workers" in capsys.readouterr().err
