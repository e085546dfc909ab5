"""The line of jobs that the quickstart runs, and their seconds."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jobs import (
    download_pairs,
    encode_pairs,
    evaluate,
    filter_pairs,
    sample,
    train_clip,
    train_dvae,
    train_prior,
    train_tokenizer,
    train_vqvae,
)
from jobs.configs.quickstart import QuickstartJob
from pipelines.data.storage import canonical_json, replace_file

DATASETS = ("raw", "filtered", "tokens")
PROMPTS = (
    "a picture of an avocado, food and fruit",
    "a picture of a guitar, music and instrument",
    "a picture of a butterfly, insect and pretty",
    "a picture of a volcano, mountain and nature",
    "a picture of a doughnut, food and sweet",
    "a picture of sunglasses, eye and glasses",
)


RERANK_POOL = 16  # pictures that are sampled for each of them; the best four are shown


@dataclass(frozen=True)
class Stage:
    """One job's line, and the directory that it makes."""

    name: str
    main: Callable[[Sequence[str] | None], int]
    directory: str
    arguments: tuple[str, ...] = ()


def model_files(job: QuickstartJob) -> dict[str, Path]:
    """The files that sampling and ranking need, by the names that the jobs have for them."""
    return {
        "tokenizer": job.output / "tokenizer" / train_tokenizer.TOKENIZER,
        "dvae": job.output / job.stage_one / f"{job.stage_one}.safetensors",
        "prior": job.output / "prior" / train_prior.PRIOR_FILE,
        "clip": job.output / "clip" / train_clip.CLIP_FILE,
    }


def stages_of(job: QuickstartJob) -> list[Stage]:
    """The jobs in their order."""
    out = job.output
    raw, filtered, tokens = f"{out}/raw", f"{out}/filtered", f"{out}/tokens"
    files = {name: str(path) for name, path in model_files(job).items()}
    models = ("--tokenizer", files["tokenizer"], "--dvae", files["dvae"])
    prior = ("--prior", files["prior"])
    best_of = ("--rerank-pool", str(RERANK_POOL), "--clip", files["clip"])
    train_stage_one = {"dvae": train_dvae.main, "vqvae": train_vqvae.main}[job.stage_one]
    return [
        Stage("download_pairs", download_pairs.main, "raw", ("--urls", f"{out}/urls.parquet")),
        Stage("filter_pairs", filter_pairs.main, "filtered", ("--raw", raw)),
        Stage("train_tokenizer", train_tokenizer.main, "tokenizer", ("--filtered", filtered)),
        Stage(
            f"train_{job.stage_one}",
            train_stage_one,
            job.stage_one,
            ("--filtered", filtered, "--training.steps", str(job.dvae_steps)),
        ),
        Stage("encode_pairs", encode_pairs.main, "tokens", ("--filtered", filtered, *models)),
        Stage(
            "train_prior",
            train_prior.main,
            "prior",
            ("--tokens", tokens, *models, "--training.steps", str(job.prior_steps)),
        ),
        Stage(
            "train_clip",
            train_clip.main,
            "clip",
            ("--filtered", filtered, *models, "--training.steps", str(job.clip_steps)),
        ),
        Stage("sample", sample.main, "samples", (*models, *prior, *best_of, "--prompts", *PROMPTS)),
        Stage(
            "evaluate",
            evaluate.main,
            "evaluation",
            (*models, *prior, "--tokens", tokens, "--filtered", filtered),
        ),
    ]


def line_of(job: QuickstartJob, stage: Stage) -> list[str]:
    """What a person would type behind ``python -m jobs.VERB``."""
    return [
        "tiny",
        "--output",
        str(job.output / stage.directory),
        "--tracking.experiment",
        job.tracking.experiment,
        *stage.arguments,
    ]


class Clock:
    """Seconds per stage, added up over interrupted runs."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seconds: dict[str, float] = json.loads(file.read_bytes()) if file.exists() else {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            elapsed = time.monotonic() - started
            self.seconds[name] = round(self.seconds.get(name, 0.0) + elapsed, 1)
            replace_file(self.file, canonical_json(self.seconds))
