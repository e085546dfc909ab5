"""infra/serve.yaml: Serve's own schema takes it, and what it names is built from it."""

from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from jobs.serving_application import from_config
from tests.fixtures.models import tiny_clip, tiny_models

FILE = Path(__file__).parents[2] / "infra" / "serve.yaml"


def config() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return loaded


def test_serve_takes_the_file_and_knows_every_key_of_it() -> None:
    loaded = config()
    schema = ServeDeploySchema.model_validate(loaded)
    # The schema lets unknown keys pass.
    assert set(loaded) <= set(ServeDeploySchema.model_fields)
    assert set(loaded["applications"][0]) <= set(ServeApplicationSchema.model_fields)
    assert schema.applications[0].import_path == f"{from_config.__module__}:{from_config.__name__}"


def test_what_it_names_is_built_from_its_flags(tmp_path: Path) -> None:
    models = tiny_models(tmp_path / "models", rows=8)
    clip = tiny_clip(tmp_path / "clip.safetensors", models.tokenizer)
    keys = tmp_path / "keys.json"
    keys.write_text("{}")
    arguments = config()["applications"][0]["args"]
    here = {"tokenizer": models.tokenizer, "dvae": models.dvae, "prior": models.prior}
    here |= {"access.keys": keys, "output": tmp_path / "out"}
    flags = [
        f"--{name}={here[name]}" if name in here else flag
        for flag in arguments["flags"]
        for name in [flag.removeprefix("--").partition("=")[0]]
    ]
    built = from_config({"preset": arguments["preset"], "flags": [*flags, f"--clip={clip}"]})
    assert built._bound_deployment.name == "ingress"


@pytest.mark.parametrize("arguments", [{}, {"preset": "13b"}, {"preset": "tiny", "flag": []}])
def test_other_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must have a preset"):
        from_config(arguments)
