"""A sampler in MLflow's registry: in, out under its alias, and nothing else in its place."""

from pathlib import Path

import pytest

from jobs import register_model
from jobs.configs.serve_sampler import ServeSamplerJob
from jobs.serving_application import checked_files
from pipelines.training import model_registry
from tests.fixtures.models import tiny_models


def test_what_was_registered_is_served_by_its_alias_until_it_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # MLflow keeps artifacts beside it
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    models = tiny_models(tmp_path / "models", rows=8)
    line = ["--tokenizer", str(models.tokenizer), "--dvae", str(models.dvae)]
    assert register_model.main([*line, "--prior", str(models.prior), "--name", "tiny"]) == 0
    assert "models:/tiny@production is version 1" in capsys.readouterr().out
    address = Path("models:/tiny@production")
    job = ServeSamplerJob(prior=address, output=tmp_path / "out")
    checked = checked_files(job)
    assert checked.files.prior != models.prior
    assert checked.files.prior.read_bytes() == models.prior.read_bytes()
    with checked.files.prior.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    with pytest.raises(ValueError, match="must have the digest"):
        checked_files(job)
    with pytest.raises(ValueError, match="must be in the registry"):
        model_registry.fetch(f"sqlite:///{tmp_path}/mlflow.db", Path("models:/no@one"), tmp_path)


@pytest.mark.parametrize("path", ["models:/a", "models:/a/3", "runs/prior.safetensors"])
def test_other_paths_are_no_addresses(path: str) -> None:
    assert not model_registry.is_address(Path(path))
