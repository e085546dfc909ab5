"""Two samplers and a reranker on Ray Serve: pools, deadlines, clients that leave, deaths, updates.

The tests stand in the order of what they do to the server; the last ones change what it serves.
"""

import base64
import dataclasses
import io
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from jobs import deployment
from jobs.configs.serve_sampler import Scale, ServeSamplerJob
from pipelines.sampling.diagnosis import NonFiniteLogits
from pipelines.sampling.picture_source import ServingLimits
from pipelines.training.weights import load_prior, save_model
from tests.fixtures.models import TINY, TinyModels, random_prior, tiny_clip, tiny_models
from tests.fixtures.ports import free_port
from tests.fixtures.processes import descendants, start_of
from tests.fixtures.samplers import sampler_pids
from tests.fixtures.waiting import asking, until

DEADLINE_SECONDS = 8.0
PATIENCE = 90.0  # seconds
# Four slots take 16,384 steps for it, and no step of Python's takes less than half a millisecond.
NEVER_DONE = {"prompt": "dog", "rerank_pool": 512, "cond_scale": 2.0, "seed": 1}


@dataclass(frozen=True)
class Served:
    """A running server and what it serves."""

    url: str
    job: ServeSamplerJob
    models: TinyModels

    def ask(self, **fields: Any) -> httpx.Response:
        headers = fields.pop("headers", {})
        body = {"prompt": "dog"} | fields
        url = f"{self.url}/v1/images/generations"
        return httpx.post(url, json=body, headers=headers, timeout=60)

    def metrics(self) -> dict[str, float]:
        lines = httpx.get(f"{self.url}/metrics", timeout=10).text.splitlines()
        pairs = [line.rpartition(" ") for line in lines if not line.startswith("#")]
        return {name: float(value) for name, _, value in pairs}


@pytest.fixture(scope="module")
def served(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    models = tiny_models(tmp_path_factory.mktemp("models"), rows=8)
    prior, metadata = load_prior(models.prior)
    metadata |= {"training": {"caption_dropout": 0.1}}
    state = prior.state_dict()
    save_model(models.prior, kind="prior", config=TINY, state=state, metadata=metadata)
    clip = tiny_clip(tmp_path_factory.mktemp("clip") / "clip.safetensors", models.tokenizer)
    job = ServeSamplerJob(
        output=tmp_path_factory.mktemp("serving"),
        tokenizer=models.tokenizer,
        dvae=models.dvae,
        prior=models.prior,
        clip=clip,
        port=free_port(),
        device="cpu",
        slots=2,
        samplers=Scale(replicas=2),
        rerankers=Scale(cpus=0),
        limits=ServingLimits(deadline_seconds=DEADLINE_SECONDS),
    )
    with deployment.serve_in_background(job) as url:
        yield Served(url=url, job=job, models=models)


def pixels_of(item: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))))


def test_it_is_ready_and_says_how_it_does(served: Served) -> None:
    assert httpx.get(f"{served.url}/readyz", timeout=10).json() == {"status": "ready"}
    assert served.metrics()["manray_slots_wanted"] == 0


def test_the_best_of_a_pool_come_back_ranked_and_each_is_what_its_seed_gives_alone(
    served: Served,
) -> None:
    data = served.ask(n=3, rerank_pool=12, seed=5).json()["data"]
    scores = [item["score"] for item in data]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert {item["seed"] for item in data} <= {*range(5, 17)}
    for item in data:
        (alone,) = served.ask(seed=item["seed"]).json()["data"]
        assert np.array_equal(pixels_of(alone), pixels_of(item))


def test_partial_pictures_come_through_while_the_picture_is_drawn(served: Served) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    events = [
        *client.images.generate(prompt="dog", stream=True, partial_images=3, extra_body={"seed": 3})
    ]
    kinds = [event.type.rpartition(".")[2] for event in events]
    assert kinds == ["partial_image"] * 3 + ["completed"]


@pytest.mark.parametrize(
    "headers", [{"x-request-timeout-seconds": "0"}, {"x-request-disconnect-disabled": "?1"}]
)
def test_no_header_switches_the_deadline_off(served: Served, headers: dict[str, str]) -> None:
    started = time.monotonic()
    answer = served.ask(**NEVER_DONE, headers=headers)
    assert time.monotonic() - started < 2 * DEADLINE_SECONDS
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("headers", [{}, {"x-request-disconnect-disabled": "?1"}])
def test_a_client_that_leaves_frees_its_slots(served: Served, headers: dict[str, str]) -> None:
    from ray import serve

    until(lambda: served.metrics()["manray_slots_wanted"] == 0)
    cancelled = served.metrics()['manray_requests_total{outcome="cancelled"}']
    handle = serve.get_deployment_handle("sampler", deployment.APP)

    def busy() -> int:  # a handle asks one of the two
        return max(handle.load.remote().result(timeout_s=10).busy for _ in range(6))

    body = NEVER_DONE | {"stream": True}
    url = f"{served.url}/v1/images/generations"
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json=body, headers=headers, timeout=httpx.Timeout(10, read=0.7))
    assert until(lambda: busy() == 0) < DEADLINE_SECONDS / 2
    assert served.metrics()['manray_requests_total{outcome="cancelled"}'] == cancelled + 1


def test_a_full_server_refuses_at_once_and_draws_on(served: Served) -> None:
    places = 2 * 2 + served.job.limits.max_waiting

    def ask(seed: int) -> httpx.Response:
        return served.ask(n=8, seed=seed)

    with ThreadPoolExecutor(3 * places) as threads:
        answers = [*threads.map(ask, range(3 * places))]
    codes = {answer.status_code for answer in answers}
    assert {200, 429} <= codes <= {200, 429, 504}
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.json()["error"]["code"] for answer in refused} == {"server_busy"}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)


def running() -> int:
    """Sampler replicas that can draw; one that has just died may be among them."""
    from ray import serve

    states = serve.status().applications[deployment.APP].deployments["sampler"].replica_states
    return sum(count for state, count in states.items() if state == "RUNNING")


def samplers() -> dict[int, int]:
    """The processes of the sampler replicas that are up, and of their batches."""
    return {
        pid: child
        for pid in sampler_pids()
        for child in descendants(pid)
        if "batch_process" in Path(f"/proc/{child}/cmdline").read_text()
    }


@pytest.mark.parametrize("whose", ["the replica", "its batch"])
def test_a_sampler_that_is_killed_costs_no_request(served: Served, whose: str) -> None:
    """Its pieces are drawn again by the other one, from the same seeds."""
    wanted = served.ask(n=4, seed=30).json()["data"]
    until(lambda: running() == len(samplers()) == 2, PATIENCE)
    sampler, batch = next(iter(samplers().items()))
    pid = sampler if whose == "the replica" else batch
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(served.ask, n=4, seed=30) for _ in range(4)]
        until(lambda: served.metrics()["manray_slots_wanted"] > 0)
        os.kill(pid, signal.SIGKILL)
        answers = [future.result() for future in asked]
    assert [answer.status_code for answer in answers] == [200] * 4
    for answer in answers:
        for mine, other in zip(answer.json()["data"], wanted, strict=True):
            assert np.array_equal(pixels_of(mine), pixels_of(other))
    until(lambda: start_of(sampler) is None and start_of(batch) is None)


def other_prior(served: Served, file: Path, *, broken: bool) -> ServeSamplerJob:
    _, metadata = load_prior(served.models.prior)
    prior = random_prior(TINY, seed=9)
    if broken:
        prior.image_head.bias.data.fill_(float("nan"))
    save_model(file, kind="prior", config=TINY, state=prior.state_dict(), metadata=metadata)
    return dataclasses.replace(served.job, prior=file, output=file.parent / "out", update=True)


def test_files_that_draw_nothing_leave_the_old_ones_serving(served: Served, tmp_path: Path) -> None:
    before = served.ask(seed=7).json()["data"]
    with pytest.raises(NonFiniteLogits, match="must be finite"):
        deployment.update(other_prior(served, tmp_path / "prior.safetensors", broken=True))
    torn = other_prior(served, tmp_path / "torn.safetensors", broken=False)
    torn.prior.write_bytes(torn.prior.read_bytes()[:-100])
    with pytest.raises(ValueError, match="torn"):
        deployment.update(torn)
    assert served.ask(seed=7).json()["data"] == before


def test_an_update_changes_the_pictures_and_no_request_fails(
    served: Served, tmp_path: Path
) -> None:
    before = served.ask(seed=7).json()["data"]
    with asking(lambda: served.ask(seed=7)) as answers:
        deployment.update(other_prior(served, tmp_path / "prior.safetensors", broken=False))
        after = len(answers)
        until(lambda: len(answers) > after + 4)
    assert [answer.text for answer in answers if answer.status_code != 200] == []
    # The old pictures first, the new ones last.
    assert answers[0].json()["data"] == before
    assert answers[-1].json()["data"] != before
