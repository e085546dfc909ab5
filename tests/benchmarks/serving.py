"""The server under load, beside the bare sampler that it is made of; all in one run.

    python -m tests.benchmarks.serving [--run runs/quickstart] [--overload-seconds 120]

Writes runs/bench/serving.json. The model is the run's; without one, one of the same size with
random weights, and the result says so. Clients, ingress and sampler share the machine: on two
cores the sampler has one of them at best. The bare sampler and the server are asked in turn: the
machine may be another's too, and change its speed from minute to minute.
"""

import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import torch
import tyro

from jobs import deployment
from jobs.configs import train_dvae, train_prior
from jobs.configs.serve_sampler import ServeSamplerJob
from models.dvae import DVAE
from pipelines.data.storage import canonical_json, replace_file, sha256_file
from pipelines.data.tokenizer import CaptionTokenizer
from pipelines.sampling.loading import ModelFiles, load_sampler
from pipelines.training.weights import save_model
from tests.fixtures.datasets import tiny_tokens
from tests.fixtures.models import random_prior
from tests.fixtures.ports import free_port
from tests.fixtures.processes import descendants
from tests.fixtures.samplers import sampler_pids

CLIENTS = 32
BATCHES = (8, 16, 32, 64)
REPEATS = 15
ROUNDS = 3
BARE_REPEATS = 5
WARM_UP_SECONDS = 3.0
FACTOR = 5
LEAVE_AFTER = 0.1  # seconds; twenty pictures at once take longer
WORDS = ("red apple", "blue boat", "green tree", "white dog", "yellow bus", "black cat")


@dataclass(frozen=True)
class Effort:
    """How long it takes, and of what."""

    run: Path = Path("runs/quickstart")
    seconds: float = 10.0
    """Of each round of the throughput."""
    overload_seconds: float = 120.0
    output: Path = Path("runs/bench/serving.json")


@dataclass
class Answers:
    """What clients saw."""

    good: list[float] = field(default_factory=list)
    """Seconds of requests that got their picture."""
    refused: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    good_at: list[float] = field(default_factory=list)
    """When they got it, on time.monotonic's clock."""


class Client:
    """Asks for one picture at a time, each with another seed."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self._url = session, f"{url}/v1/images/generations"
        self._count = 0

    async def ask(self, into: Answers) -> float:
        """One request, entered in the answers; its seconds."""
        started = time.monotonic()
        try:
            async with self._session.post(self._url, json=self._body()) as answer:
                body, status = await answer.read(), answer.status
        except aiohttp.ClientError as error:
            into.failed.append(type(error).__name__)
            return time.monotonic() - started
        ended = time.monotonic()
        if status == 200:
            into.good.append(ended - started)
            into.good_at.append(ended)
        elif status == 429:
            into.refused.append(ended - started)
        else:
            into.failed.append(f"{status} {body[:200].decode(errors='replace')}")
        return ended - started

    async def first_and_last(self) -> tuple[float, float]:
        """Seconds until the first partial picture and until the whole one."""
        started, first = time.monotonic(), 0.0
        body = self._body() | {"stream": True, "partial_images": 3}
        async with self._session.post(self._url, json=body) as answer:
            async for line in answer.content:
                if b"partial_image" in line and not first:
                    first = time.monotonic() - started
        return first, time.monotonic() - started

    async def leave(self, seconds: float) -> None:
        """Ask for a picture, and go before it is there."""
        body = self._body() | {"stream": True}
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                async with self._session.post(self._url, json=body) as answer:
                    await answer.read()

    def _body(self) -> dict[str, Any]:
        self._count += 1
        return {"prompt": WORDS[self._count % len(WORDS)], "seed": self._count}


def main() -> int:
    """Measure, print, write."""
    effort = tyro.cli(Effort)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mrb", dir="/tmp") as directory:
        files, which = model_files(effort.run, Path(directory))
        result: dict[str, Any] = {"model": which, "precision": "fp32", "cpus": os.cpu_count()}
        bare = Bare(files)
        result |= {"best_batch": bare.best_batch}
        job = ServeSamplerJob(
            output=Path(directory) / "serving",
            tokenizer=files.tokenizer,
            dvae=files.dvae,
            prior=files.prior,
            port=free_port(),
            device="cpu",
            slots=max(bare.best_batch, CLIENTS),
        )
        with deployment.serve_in_background(job) as url:
            result |= asyncio.run(served(url, effort, bare))
    print(json.dumps(result, indent=1))
    replace_file(effort.output, canonical_json(result))
    return 0


def model_files(run: Path, directory: Path) -> tuple[ModelFiles, str]:
    """A run's models, or random ones of the quickstart's sizes; and which."""
    files = ModelFiles(
        tokenizer=run / "tokenizer/tokenizer.json",
        dvae=run / "dvae/dvae.safetensors",
        prior=run / "prior/prior.safetensors",
    )
    if all(file.exists() for file in (files.tokenizer, files.dvae, files.prior)):
        return files, f"trained, of {run}"
    tokens = tiny_tokens(directory / "data", rows=8)
    prior_config = train_prior.PRESETS["tiny"][1].prior
    dvae_config = train_dvae.PRESETS["tiny"][1].dvae
    dvae, prior = directory / "dvae.safetensors", directory / "prior.safetensors"
    torch.manual_seed(0)
    state = DVAE(dvae_config).state_dict()
    save_model(dvae, kind="dvae", config=dvae_config, state=state, metadata={})
    metadata = {
        "tokenizer_sha256": CaptionTokenizer.from_file(tokens.tokenizer).digest,
        "dvae_sha256": sha256_file(dvae),
    }
    state = random_prior(prior_config, spread=0.02).state_dict()
    save_model(prior, kind="prior", config=prior_config, state=state, metadata=metadata)
    files = ModelFiles(tokenizer=tokens.tokenizer, dvae=dvae, prior=prior)
    return files, "random weights of the quickstart's sizes"


class Bare:
    """The sampler without a server, in this process."""

    def __init__(self, files: ModelFiles) -> None:
        self._samplers = {
            batch: load_sampler(files, device="cpu", max_candidates=batch)
            for batch in (1, *BATCHES)
        }
        rates = [(self.pictures_per_s(batch), batch) for _ in range(ROUNDS) for batch in BATCHES]
        self.best_batch = max(rates)[1]

    def pictures_per_s(self, batch: int) -> float:
        """Of so many at once."""
        prompts = [WORDS[index % len(WORDS)] for index in range(batch)]
        sampler = self._samplers[batch]
        return batch / statistics.median(
            seconds(lambda: sampler.sample(prompts, n=1, seed=1), BARE_REPEATS)
        )

    def lone_s(self) -> float:
        """Seconds of one picture."""
        started = time.monotonic()
        self._samplers[1].generate("red apple")
        return time.monotonic() - started


def seconds(work: Callable[[], Any], repeats: int) -> list[float]:
    """Of each repeat after a first that does not count."""
    work()
    taken = []
    for _ in range(repeats):
        started = time.monotonic()
        work()
        taken.append(time.monotonic() - started)
    return taken


async def served(url: str, effort: Effort, bare: Bare) -> dict[str, Any]:
    """Everything that is measured over HTTP."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        client = Client(session, url)
        result = await alone(client, bare)
        result |= await throughput(client, effort.seconds, bare)
        capacity = result["served_throughput"]["ours"]
        result |= await overload(client, effort.overload_seconds, capacity, result["lone_s"])
        result |= await dropped(client)
        result |= await killed(client)
    return result


async def alone(client: Client, bare: Bare) -> dict[str, Any]:
    """One client, nobody else; in turn with the bare sampler."""
    ours, theirs = list[float](), list[float]()
    for _ in range(3 + REPEATS):
        theirs.append(await asyncio.to_thread(bare.lone_s))
        ours.append(await client.ask(Answers()))
    pairs = [await client.first_and_last() for _ in range(REPEATS)]
    bare_s = statistics.median(theirs[3:])
    return {
        "bare_lone_s": bare_s,
        "lone_s": statistics.median(ours[3:]),
        "lone_allowed_s": 1.15 * bare_s + 0.03,
        "first_partial_share": statistics.median(first / last for first, last in pairs),
    }


async def throughput(client: Client, length: float, bare: Bare) -> dict[str, Any]:
    """Pictures a second of clients that ask as soon as they are answered; in turn with the bare
    sampler."""
    into, ours, theirs = Answers(), list[float](), list[float]()
    for _ in range(ROUNDS):
        theirs.append(await asyncio.to_thread(bare.pictures_per_s, bare.best_batch))
        ours.append(await _pictures_per_s(client, length, into))
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return {
        "served_throughput": {
            "row": "served-throughput",
            "clients": CLIENTS,
            "ours": statistics.median(ours),
            "theirs": statistics.median(theirs),
            "unit": "pictures/s",
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "refused": len(into.refused),
            "failed": into.failed[:5],
        }
    }


async def _pictures_per_s(client: Client, length: float, into: Answers) -> float:
    started = time.monotonic()
    end = started + WARM_UP_SECONDS + length

    async def ask_on() -> None:
        while time.monotonic() < end:
            if await client.ask(into) < 0.05:  # refused: a polite client comes back later
                await asyncio.sleep(0.05)

    await asyncio.gather(*(ask_on() for _ in range(CLIENTS)))
    return sum(started + WARM_UP_SECONDS <= at < end for at in into.good_at) / length


async def overload(client: Client, length: float, capacity: float, lone: float) -> dict[str, Any]:
    """Requests that come at several times the rate that can be drawn, whatever is answered."""
    into, before = Answers(), memory()
    started, asked = time.monotonic(), set[asyncio.Task[float]]()
    while (now := time.monotonic() - started) < length:
        due = int(now * FACTOR * capacity) - client_count(into, asked)
        for _ in range(due):
            task = asyncio.create_task(client.ask(into))
            asked.add(task)
            task.add_done_callback(asked.discard)
        await asyncio.sleep(0.005)
    goodput, after = len(into.good) / length, memory()
    await asyncio.gather(*asked)
    ended, again = time.monotonic(), Answers()
    while await client.ask(again) > 1.5 * lone and time.monotonic() - ended < 60:
        pass
    refused = sorted(into.refused)
    return {
        "overload": {
            "factor": FACTOR,
            "seconds": length,
            "goodput_share": goodput / capacity,
            "refused": len(refused),
            "refusal_median_s": statistics.median(refused) if refused else None,
            "refusal_p99_s": refused[int(0.99 * len(refused))] if refused else None,
            "failed": into.failed[:5],
            "failed_count": len(into.failed),
            "rss_growth_mb": (after - before) / 1e6,
            "normal_again_s": time.monotonic() - ended,
        }
    }


def client_count(into: Answers, asked: set[Any]) -> int:
    """Requests that were sent so far."""
    return len(into.good) + len(into.refused) + len(into.failed) + len(asked)


def memory() -> int:
    """Resident bytes of the server's processes: whatever Ray started for us."""
    total = 0
    for pid in descendants(os.getpid()):
        with suppress(OSError):
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            total += pages * os.sysconf("SC_PAGESIZE")
    return total


async def dropped(client: Client) -> dict[str, Any]:
    """Clients that leave in the middle: how long their slots stay taken, and for how many steps."""
    from ray import serve

    handle = serve.get_deployment_handle("sampler", deployment.APP)

    async def load() -> Any:
        return await asyncio.to_thread(lambda: handle.load.remote().result(timeout_s=10))

    await asyncio.gather(*(client.leave(LEAVE_AFTER) for _ in range(20)))
    gone, first = time.monotonic(), await load()
    while (now := await load()).busy or now.waiting:
        await asyncio.sleep(0.002)
    return {
        "dropped": {
            "connections": 20,
            "free_after_s": time.monotonic() - gone,
            "steps_until_free": now.steps - first.steps,
        }
    }


async def killed(client: Client) -> dict[str, Any]:
    """kill -9 of the only sampler under load."""
    (pid,) = await asyncio.to_thread(sampler_pids)
    into, stop = Answers(), asyncio.Event()

    async def ask_on() -> None:
        while not stop.is_set():
            await client.ask(into)

    clients = [asyncio.create_task(ask_on()) for _ in range(8)]
    await asyncio.sleep(2)
    os.kill(pid, signal.SIGKILL)
    at = time.monotonic()
    while not any(moment > at + 0.5 for moment in into.good_at) and time.monotonic() - at < 120:
        await asyncio.sleep(0.05)
    recovered = time.monotonic() - at
    stop.set()
    await asyncio.gather(*clients)
    return {
        "killed": {
            "in_flight": len(clients),
            "failed": len(into.failed),
            "errors": sorted(set(into.failed))[:3],
            "recovery_s": recovered,
        }
    }


if __name__ == "__main__":
    sys.exit(main())
