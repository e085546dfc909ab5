"""The model behind Ray Serve, asked by the official OpenAI client."""

import base64
import dataclasses
import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from jobs import deployment, serve_sampler
from jobs.configs.serve_sampler import Scale, ServeSamplerJob
from jobs.rate_limits import NAMESPACE, actor_name
from pipelines.sampling.access import AccessSettings
from pipelines.sampling.engine import Start
from pipelines.sampling.keys import add_key, remove_key
from pipelines.sampling.rate_limits import RateLimits
from tests.fixtures.models import TinyModels, tiny_models
from tests.fixtures.ports import free_port

ROOT = Path(__file__).parents[2]
RATE = RateLimits(pictures_per_minute=1e6, burst=1000)


@dataclass(frozen=True)
class Served:
    """A running server and what it serves."""

    url: str
    job: ServeSamplerJob
    models: TinyModels
    key: str

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0)

    @property
    def bearer(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return tiny_models(tmp_path_factory.mktemp("models"), rows=8)


@pytest.fixture(scope="module")
def served(ray_cluster: None, models: TinyModels, tmp_path_factory: Any) -> Iterator[Served]:
    output = tmp_path_factory.mktemp("serving")
    key = add_key(output / "keys", "ann")
    job = ServeSamplerJob(
        access=AccessSettings(keys=output / "keys", rate=RATE),
        output=output,
        tokenizer=models.tokenizer,
        dvae=models.dvae,
        prior=models.prior,
        port=free_port(),
        device="cpu",
        slots=4,
        samplers=Scale(replicas=2),
        listen="proxies",
    )
    with deployment.serve_in_background(job) as url:
        yield Served(url=url, job=job, models=models, key=key)
    with socket.socket() as probe:  # whoever leaves, frees the port
        assert probe.connect_ex((job.host, job.port)) != 0


def pixels_of(b64_json: str | None) -> np.ndarray:
    assert b64_json is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json))))


def test_the_official_client_gets_pictures_and_the_same_again_for_a_seed(served: Served) -> None:
    client = served.client()

    def ask() -> Any:
        return client.images.generate(
            prompt="red apple",
            model="manray",
            n=2,
            size="auto",
            response_format="b64_json",
            extra_body={"seed": 11, "temperature": 0.9, "top_k": 100},
        )

    first, second = ask(), ask()
    assert len(first.data) == 2
    assert pixels_of(first.data[0].b64_json).shape == (64, 64, 3)
    assert first.data[0].b64_json != first.data[1].b64_json
    assert [item.b64_json for item in first.data] == [item.b64_json for item in second.data]
    assert first.data[1].seed == 12
    assert first.usage.output_tokens == 2 * 64
    assert first.usage.total_tokens == first.usage.input_tokens + 2 * 64


def test_what_is_served_is_what_the_command_line_samples(served: Served) -> None:
    answer = served.client().images.generate(prompt="dog", extra_body={"seed": 4})
    assert answer.data is not None
    wanted = served.models.sampler().generate("dog", seed=4)[0]
    assert np.array_equal(pixels_of(answer.data[0].b64_json), wanted)


@pytest.mark.parametrize(
    ("param", "request_"),
    [
        ("n", {"prompt": "dog", "n": 0}),
        ("n", {"prompt": "dog", "n": 11}),
        ("n", {"prompt": "dog", "extra_body": {"n": "two"}}),
        ("prompt", {"prompt": ""}),
        ("prompt", {"prompt": "q " * 40}),
        ("prompt", {"prompt": "a\0b"}),
        ("prompt", {"prompt": "dog", "extra_body": {"prompt": 7}}),
        ("size", {"prompt": "dog", "size": "1024x1024"}),
        ("response_format", {"prompt": "dog", "response_format": "url"}),
        ("quality", {"prompt": "dog", "quality": "hd"}),
        ("temperature", {"prompt": "dog", "extra_body": {"temperature": 0}}),
        ("top_k", {"prompt": "dog", "extra_body": {"top_k": 129}}),
    ],
)
def test_a_bad_request_names_its_parameter_to_the_official_client(
    served: Served, param: str, request_: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.client().images.generate(**request_)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id


def test_models_are_listed_for_the_official_client(served: Served) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == ["manray"]
    assert client.models.retrieve("manray").owned_by == "manray"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("dall-e-3")
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="dog", model="dall-e-3")
    assert caught.value.param == "model"


def test_raw_http_is_answered_in_the_envelope_with_one_request_id(served: Served) -> None:
    for method, path, status in (
        ("GET", "/nope", 404),
        ("GET", "/v1/images/generations", 405),
        ("POST", "/v1/images/generations", 415),
    ):
        answer = httpx.request(method, f"{served.url}{path}", content=b"{}", headers=served.bearer)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert len(answer.headers.get_list("x-request-id")) == 1
    large = {"prompt": "a" * 70_000}
    answer = httpx.post(f"{served.url}/v1/images/generations", json=large, headers=served.bearer)
    assert answer.status_code == 413
    assert httpx.get(f"{served.url}/healthz").json() == {"status": "ok", "model": "manray"}


def test_the_printed_curl_line_works(served: Served) -> None:
    line = deployment.curl_line(served.url, 'it\'s a "red" apple', with_key=True)
    done = subprocess.run(
        ["sh", "-c", line],
        env=os.environ | {"MANRAY_KEY": served.key},
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert pixels_of(json.loads(done.stdout)["data"][0]["b64_json"]).shape == (64, 64, 3)


def test_a_stream_comes_through_as_it_is_drawn(served: Served) -> None:
    stream = served.client().images.generate(
        prompt="dog", stream=True, partial_images=3, extra_body={"seed": 4}
    )
    events: list[Any] = list(stream)
    assert [event.type.rpartition(".")[2] for event in events] == [
        *["partial_image"] * 3,
        "completed",
    ]
    assert [event.rows for event in events[:3]] == [1, 3, 5]
    wanted = served.models.sampler().generate("dog", seed=4)[0]
    assert np.array_equal(pixels_of(events[3].b64_json), wanted)


def test_a_picture_is_completed_from_its_upper_rows(served: Served) -> None:
    sampler = served.models.sampler()
    original, file = sampler.generate("dog", seed=5)[0], io.BytesIO()
    Image.fromarray(original).save(file, "PNG")
    answer = served.client().images.edit(
        image=file.getvalue(), prompt="dog", extra_body={"seed": 9, "keep_rows": 3}
    )
    start = Start(tokens=sampler.first_rows(original, 3))
    wanted = sampler.sample(["dog"], n=1, seed=9, start=start)[0][0]
    assert answer.data is not None
    assert np.array_equal(pixels_of(answer.data[0].b64_json), wanted.pixels)


def test_the_page_is_there_and_the_rest_needs_a_key_of_the_file(served: Served) -> None:
    page = httpx.get(f"{served.url}/")
    assert "playground" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert httpx.get(f"{served.url}/v1/models").status_code == 401
    keys = served.job.access.keys
    assert keys is not None
    bob = {"authorization": f"Bearer {add_key(keys, 'bob')}"}
    assert httpx.get(f"{served.url}/v1/models", headers=bob).status_code == 200
    remove_key(keys, "bob")
    assert httpx.get(f"{served.url}/v1/models", headers=bob).status_code == 401
    evil = served.bearer | {"host": "evil.example"}
    assert httpx.get(f"{served.url}/v1/models", headers=evil).status_code == 421


def test_all_replicas_share_the_buckets_of_a_key(served: Served) -> None:
    import ray

    assert served.client().images.generate(prompt="dog").data
    buckets = ray.get_actor(actor_name(RATE), namespace=NAMESPACE)
    assert ray.get(buckets.take.remote("nobody", 1000)) == 0
    assert ray.get(buckets.take.remote("nobody", 1000)) > 0
    ray.kill(buckets)
    assert served.client().images.generate(prompt="dog").data
    again = ray.get_actor(actor_name(RATE), namespace=NAMESPACE)
    assert ray.get(again.take.remote("nobody", 1000)) == 0


def test_the_record_says_what_is_served_where(served: Served) -> None:
    record = json.loads((served.job.output / "serving.json").read_text())
    assert record["url"] == served.url
    assert set(record["digests"]) == {"tokenizer", "dvae", "prior"}


def line(models: TinyModels, output: Path, *more: str) -> list[str]:
    return [
        *("tiny", "--output", str(output), "--tokenizer", str(models.tokenizer)),
        *("--dvae", str(models.dvae), "--prior", str(models.prior), "--device", "cpu", *more),
    ]


def test_a_taken_port_is_said_before_anything_is_started(
    models: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        assert serve_sampler.main(line(models, tmp_path / "out", "--port", port)) == 2
    said = capsys.readouterr().err
    assert f"127.0.0.1:{port} is taken" in said
    assert "--port" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["--prior", "--dvae", "--tokenizer"])
def test_a_missing_model_is_said_before_anything_is_started(
    models: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    arguments = line(models, tmp_path / "out", "--port", str(free_port()))
    assert serve_sampler.main([*arguments, missing, str(tmp_path / "none")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_second_server_on_the_same_cluster_is_refused(served: Served, tmp_path: Path) -> None:
    second = dataclasses.replace(served.job, port=free_port(), output=tmp_path / "out")
    with (
        pytest.raises(ValueError, match="does already"),
        deployment.serve_in_background(second),
    ):
        pass
    assert httpx.get(f"{served.url}/healthz").status_code == 200


@pytest.mark.slow
def test_ctrl_c_ends_serving_in_order(models: TinyModels, tmp_path: Path) -> None:
    port = str(free_port())
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "jobs.serve_sampler"),
            *line(models, tmp_path / "out", "--port", port),
        ],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        said = []
        for text in process.stdout:
            said.append(text)
            if text.startswith("curl "):
                break
        assert text.startswith("curl "), "".join(said)[-4000:]
        assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: Ray's processes get it too
        rest = process.stdout.read()
        assert process.wait(60) == 0, rest
        assert json.loads(rest.splitlines()[-1])["job"] == "serve_sampler"
    finally:
        process.kill()
        process.wait()
