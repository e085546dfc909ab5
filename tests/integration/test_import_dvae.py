"""jobs.import_dvae end to end, as a user runs it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from mlflow import MlflowClient

from jobs import import_dvae
from models.dvae import DVAE
from pipelines.data.plan import lease
from pipelines.data.storage import sha256_file
from pipelines.training.weights import load_stage_one
from tests.fixtures.peers import need_peer

SMALL = {"n_hid": 64, "vocab_size": 512, "n_blk_per_group": 1}


class Hostile:
    """A part of a module that runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


@pytest.fixture(scope="module")
def package() -> ModuleType:
    return need_peer("dall_e")


@pytest.fixture
def released(package: ModuleType, tmp_path: Path) -> Path:
    """A directory with two files such as OpenAI's, of a small model."""
    torch.manual_seed(0)
    torch.save(package.Encoder(**SMALL), tmp_path / "encoder.pkl")
    torch.save(package.Decoder(**SMALL, n_init=16), tmp_path / "decoder.pkl")
    return tmp_path


def arguments(path: Path, *more: str) -> list[str]:
    files = ("--encoder", str(path / "encoder.pkl"), "--decoder", str(path / "decoder.pkl"))
    return ["released", *files, "--output", str(path / "out"), *more]


def snapshot(path: Path) -> dict[str, bytes]:
    files = (file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def summary_of(output: str) -> dict[str, object]:
    """The last line that a job prints."""
    summary: dict[str, object] = json.loads(output.strip().splitlines()[-1])
    return summary


@torch.no_grad()
def test_the_model_is_made_once_and_a_second_run_changes_nothing(
    package: ModuleType, released: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert import_dvae.main(arguments(released, "--image-size", "64")) == 0
    first = summary_of(capsys.readouterr().out)
    file = released / "out" / "dvae.safetensors"
    model, metadata = load_stage_one(file)
    assert isinstance(model, DVAE)
    assert first["sha256"] == sha256_file(file)
    assert first["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert (model.config.image_size, model.config.vocab_size) == (64, 512)
    assert metadata == {
        "source": "openai/DALL-E",
        "encoder_sha256": sha256_file(released / "encoder.pkl"),
        "decoder_sha256": sha256_file(released / "decoder.pkl"),
    }
    pixels = torch.rand(1, 3, 64, 64)
    torch.manual_seed(0)
    theirs = package.Encoder(**SMALL)(package.map_pixels(pixels))
    torch.testing.assert_close(model.logits(pixels), theirs, rtol=1e-5, atol=1e-5)

    before = snapshot(released)
    assert import_dvae.main(arguments(released, "--image-size", "64")) == 0
    said = capsys.readouterr().out
    assert "nothing to do" in said
    assert snapshot(released) == before
    assert {**summary_of(said), "seconds": 0} == {**first, "seconds": 0}


def test_the_run_is_in_mlflow(
    released: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"sqlite:///{released}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert import_dvae.main(arguments(released, "--tracking.experiment", "codes")) == 0
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("codes")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["stage"] == "import_dvae"
    assert run.data.tags["encoder_digest"] == sha256_file(released / "encoder.pkl")
    assert run.data.tags["decoder_digest"] == sha256_file(released / "decoder.pkl")
    assert run.data.params["dvae.n_hid"] == "64"
    assert run.data.metrics["parameters"] == summary_of(capsys.readouterr().out)["parameters"]


def test_a_hostile_file_is_refused_and_nothing_is_written(
    package: ModuleType, released: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = package.Encoder(**SMALL)
    encoder.blocks.group_1.more = Hostile(f"touch {released}/canary")
    torch.save(encoder, released / "encoder.pkl")
    before = snapshot(released)
    assert import_dvae.main(arguments(released)) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert f"{released}/encoder.pkl must be a model that torch.save wrote" in said
    assert "posix.system" in said
    assert snapshot(released) == before
    assert not (released / "out").exists()


def test_weights_that_are_not_finite_are_refused_and_nothing_is_written(
    package: ModuleType, released: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder = package.Decoder(**SMALL)
    decoder.blocks.input.b.data[3] = float("nan")
    torch.save(decoder, released / "decoder.pkl")
    assert import_dvae.main(arguments(released)) == 2
    assert "decoder.pkl must hold finite weights" in capsys.readouterr().err
    assert not (released / "out").exists()


def test_files_that_are_not_there_are_said_in_one_line_with_their_address(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert import_dvae.main(arguments(tmp_path)) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert f"there is no file {tmp_path}/encoder.pkl: download https://" in said
    assert not (tmp_path / "out").exists()


def test_other_files_or_settings_on_the_same_output_are_refused(
    package: ModuleType, released: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert import_dvae.main(arguments(released)) == 0
    before = snapshot(released / "out")
    assert import_dvae.main(arguments(released, "--image-size", "128")) == 2
    assert '"image_size": 128' in capsys.readouterr().err
    torch.save(package.Encoder(**SMALL), released / "encoder.pkl")
    assert import_dvae.main(arguments(released)) == 2
    assert sha256_file(released / "encoder.pkl") in capsys.readouterr().err
    assert snapshot(released / "out") == before


def test_a_second_driver_on_the_same_output_is_refused(
    released: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with lease(released / "out"):
        assert import_dvae.main(arguments(released)) == 2
    assert "one writer at a time" in capsys.readouterr().err
    assert not (released / "out" / "dvae.safetensors").exists()


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(
    released: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert import_dvae.main(arguments(released, "--dry-run")) == 0
    said = capsys.readouterr().out
    assert "512 codes, n_hid 64, n_init 16, 1 blocks in each group" in said
    assert "256 px to a grid of 32×32" in said
    assert not (released / "out").exists()


def test_a_size_that_no_grid_fits_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert import_dvae.main(["released", "--image-size", "100"]) == 2
    assert "image_size must be a multiple of 8, got 100" in capsys.readouterr().err
