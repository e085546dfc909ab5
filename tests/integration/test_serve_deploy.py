"""`serve deploy infra/serve.yaml` on a running head, with other files: asked, updated, ended.

The file is the one of the repository; only paths, ports and counts are this machine's.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml  # type: ignore[import-untyped]

from pipelines.sampling.keys import add_key
from pipelines.training.weights import read_header, save_model
from tests.fixtures.models import TINY, TinyModels, random_prior, tiny_models
from tests.fixtures.ports import free_port
from tests.fixtures.ray_head import RayHead, ray_head, status_of
from tests.fixtures.waiting import asking, until
from tests.integration.test_serve_config import config

# Seconds. New samplers are four processes that import torch, beside those that still serve.
PATIENCE = 240.0

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def head(private_directory: Path) -> Iterator[RayHead]:
    # Two samplers and an ingress, and once more while new ones start.
    with ray_head(private_directory / "d", num_cpus=8) as head:
        yield head


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return tiny_models(tmp_path_factory.mktemp("models"), rows=8)


def here(models: TinyModels, prior: Path, port: int, keys: Path, file: Path) -> Path:
    """infra/serve.yaml for this machine, as a file."""
    loaded: dict[str, Any] = config()
    loaded["http_options"] |= {"host": "127.0.0.1", "port": port}
    arguments = loaded["applications"][0]["args"]
    paths = {"tokenizer": models.tokenizer, "dvae": models.dvae, "prior": prior}
    mine = paths | {"access.keys": keys, "output": file.parent / "serving"}
    kept = [flag for flag in arguments["flags"] if flag[2:].partition("=")[0] not in mine]
    arguments["flags"] = [*kept, *(f"--{name}={value}" for name, value in mine.items())]
    arguments["flags"] += ["--samplers.most-replicas=3", "--device=cpu", "--slots=4"]
    arguments["preset"] = "tiny"
    file.write_text(yaml.safe_dump(loaded))
    return file


def serve(head: RayHead, *arguments: str) -> str:
    done = head.run("serve", *arguments, "--address", head.api, seconds=60)
    assert done.returncode == 0, done.stdout
    return done.stdout


def picture(url: str, key: str) -> httpx.Response:
    return httpx.post(
        f"{url}/v1/images/generations",
        json={"prompt": "a red apple", "seed": 7},
        headers={"Authorization": f"Bearer {key}"},
        timeout=60,
    )


def test_the_file_serves_is_updated_without_a_failed_request_and_ends(
    head: RayHead, models: TinyModels, tmp_path: Path
) -> None:
    port = free_port()
    url, keys = f"http://127.0.0.1:{port}", tmp_path / "keys.json"
    key = add_key(keys, "someone")

    def status() -> str:
        return serve(head, "status")

    first = here(models, models.prior, port, keys, tmp_path / "first.yaml")
    serve(head, "deploy", str(first))
    until(lambda: status_of(f"{url}/readyz") == 200, PATIENCE, status)

    assert picture(url, "wrong").status_code == 401
    answer = picture(url, key)
    assert answer.status_code == 200, answer.text
    before = answer.json()["data"][0]["b64_json"]
    assert picture(url, key).json()["data"][0]["b64_json"] == before

    other = tmp_path / "other.safetensors"
    metadata = read_header(models.prior, "prior")["metadata"]
    state = random_prior(TINY, seed=1).state_dict()
    save_model(other, kind="prior", config=TINY, state=state, metadata=metadata)
    with asking(lambda: picture(url, key)) as seen:
        second = here(models, other, port, keys, tmp_path / "second.yaml")
        serve(head, "deploy", str(second))

        def changed() -> bool:
            return bool(seen) and seen[-1].json()["data"][0]["b64_json"] != before

        until(changed, PATIENCE, status)
    assert {answer.status_code for answer in seen} == {200}

    serve(head, "shutdown", "--yes")
    with pytest.raises(httpx.HTTPError):
        picture(url, key)
