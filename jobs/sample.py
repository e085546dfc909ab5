"""Make pictures for prompts: → OUTPUT/prompt-*.png, samples.png and samples.json."""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jobs import runtime
from jobs.configs.sample import PRESETS, SampleJob
from jobs.progress import Progress
from pipelines.data import plan
from pipelines.data.decode import UnusablePicture, decode_picture
from pipelines.data.storage import canonical_json, replace_file, sha256_file
from pipelines.sampling.api import png
from pipelines.sampling.engine import Sample, Sampler, Start
from pipelines.sampling.grid import captioned_rows
from pipelines.sampling.loading import ModelFiles, check_files, load_sampler, torch_device
from pipelines.sampling.reranking import Reranker, best_first, load_reranker
from pipelines.training import tracking
from pipelines.training.run_directory import run_tags

STAGE = "sample"
GRID = "samples.png"
RECORD = "samples.json"

Drawn = tuple[Sample, float | None]
"""A picture and the reranker's score, if there is a reranker."""


def main(argv: Sequence[str] | None = None) -> int:
    return runtime.run_job(STAGE, PRESETS, sample, argv, describe)


def describe(job: SampleJob) -> list[str]:
    """The lines below the config of a dry run."""
    prompts = read_prompts(job)
    choice = job.choice
    kept = "" if choice.clip is None else f", keep the best {choice.pictures_per_prompt} of each"
    return [
        f"sample {len(prompts) * job.choice.candidates} pictures for {len(prompts)} prompts{kept}",
        f"write {job.output / GRID}",
    ]


def sample(job: SampleJob) -> dict[str, Any]:
    """Check prompts and files, sample, write; a finished output with these settings stays."""
    prompts = read_prompts(job)
    files = ModelFiles(tokenizer=job.tokenizer, dvae=job.dvae, prior=job.prior)
    checked = check_files(files)
    sampler = load_sampler(files, device=job.device, max_candidates=job.max_candidates)
    reranker = _reranker(job)
    job.sampling.check(checked.prior.image_vocab_size)
    if job.sampling.guided and not checked.caption_dropout:
        print(
            f"notice: {job.prior} was trained with caption_dropout 0: it has never seen the empty "
            f"caption that sampling.cond_scale {job.sampling.cond_scale} compares with",
            flush=True,
        )
    for prompt in prompts:
        check_prompt(job, sampler, prompt)
    start = _start(job, sampler)
    inputs = checked.digests
    if job.start.prime_image:
        inputs = inputs | {"prime_image": sha256_file(Path(job.start.prime_image))}
    settings = {
        "prompts": prompts,
        "pictures_per_prompt": job.choice.pictures_per_prompt,
        "seed": job.seed,
        "sampling": asdict(job.sampling),
        "prime_rows": job.start.prime_rows,
        "complete_captions": job.start.complete_captions,
    }
    if job.choice.clip is not None:
        inputs = inputs | {"clip": sha256_file(job.choice.clip)}
        settings["rerank_pool"] = job.choice.rerank_pool
    with plan.lease(job.output):
        plan.claim(job.output, stage=STAGE, config=settings, inputs=inputs)
        if (job.output / RECORD).exists():
            runtime.nothing_to_do(job.output / GRID)
        else:
            _sample(job, inputs, settings, partial(_draw, job, prompts, sampler, start, reranker))
    return {
        "prompts": len(prompts),
        "pictures": len(prompts) * job.choice.pictures_per_prompt,
        "grid": job.output / GRID,
    }


def read_prompts(job: SampleJob) -> list[str]:
    """--prompts, or the lines of --prompt-file; blank lines count for nothing."""
    if not job.prompt_file:
        prompts = list(job.prompts)
    else:
        try:
            lines = Path(job.prompt_file).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{job.prompt_file} must be text in UTF-8: {error}") from error
        prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError("there must be a prompt, got none: give --prompts or --prompt-file")
    return prompts


def check_prompt(job: SampleJob, sampler: Sampler, prompt: str) -> None:
    """Refuse a prompt that is no text; one that is too long as well, or say that it is cut."""
    length = sampler.tokenizer.count(prompt) if job.start.long_prompts == "cut" else 0
    if length <= sampler.prompt_limit:
        sampler.check_prompt(prompt)
        return
    print(
        f"notice: of the {length} tokens of {prompt[:40]!r} the first {sampler.prompt_limit} count",
        flush=True,
    )


def _start(job: SampleJob, sampler: Sampler) -> Start:
    complete = job.start.complete_captions
    if not job.start.prime_image:
        return Start(complete_captions=complete)
    try:
        picture = decode_picture(Path(job.start.prime_image).read_bytes())
    except UnusablePicture as error:
        raise ValueError(f"{job.start.prime_image} must be a picture, got {error}") from error
    tokens = sampler.first_rows(picture, job.start.prime_rows)
    return Start(tokens=tokens, complete_captions=complete)


def _reranker(job: SampleJob) -> Reranker | None:
    clip = job.choice.clip
    return None if clip is None else load_reranker(clip, job.tokenizer, torch_device(job.device))


def _sample(
    job: SampleJob,
    inputs: dict[str, str],
    settings: dict[str, Any],
    draw: Callable[[], list[list[Drawn]]],
) -> None:
    parents = {"prior": job.prior.parent, "dvae": job.dvae.parent}
    with tracking.open_run(
        job.tracking,
        stage=STAGE,
        settings=settings,
        tags=run_tags(inputs, parents),
        directory=job.output,
        uri=runtime.tracking_uri(),
    ) as tracker:
        prompts, rows = settings["prompts"], draw()
        record = [
            {"prompt": prompt, "pictures": _write_pictures(job.output, number, prompt, drawn)}
            for number, (prompt, drawn) in enumerate(zip(prompts, rows, strict=True))
        ]
        grid = captioned_rows(
            [
                (prompt, [sample.pixels for sample, _ in drawn])
                for prompt, drawn in zip(prompts, rows, strict=True)
            ]
        )
        replace_file(job.output / GRID, png(grid))
        tracker.log_image("samples", grid, step=0)
        # Last: it says that the job is done.
        replace_file(job.output / RECORD, canonical_json(record))


def _draw(
    job: SampleJob,
    prompts: list[str],
    sampler: Sampler,
    start: Start,
    reranker: Reranker | None,
) -> list[list[Drawn]]:
    """Every prompt's pictures, the best of its pool first if there is one."""
    config = sampler.prior.config
    length = config.image_len - job.start.prime_rows * config.grid
    total = len(prompts) * job.choice.candidates * length
    with Progress(STAGE, total, "image tokens") as progress:

        def sample_all(some: list[str]) -> list[list[Sample]]:
            return sampler.sample(
                some,
                n=job.choice.candidates,
                seed=job.seed,
                sampling=job.sampling,
                start=start,
                on_progress=lambda done, tokens: progress.advance(len(tokens)),
            )

        if reranker is None:
            return [[(sample, None) for sample in row] for row in sample_all(prompts)]
        # A prompt at a time: of a pool, only the best stay in memory.
        kept = job.choice.pictures_per_prompt
        return [_best(reranker, prompt, sample_all([prompt])[0], kept=kept) for prompt in prompts]


def _best(reranker: Reranker, prompt: str, samples: list[Sample], *, kept: int) -> list[Drawn]:
    scores = reranker.scores(prompt, np.stack([sample.pixels for sample in samples]))
    return [(samples[place], float(scores[place])) for place in best_first(scores)[:kept]]


def _write_pictures(
    output: Path, number: int, prompt: str, drawn: list[Drawn]
) -> list[dict[str, Any]]:
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40]
    entries = []
    for sample, score in drawn:
        name = f"prompt-{number:02d}-{words}-seed-{sample.seed}.png".replace("--", "-")
        replace_file(output / name, png(sample.pixels))
        entry = {"file": name, "seed": sample.seed, "tokens": sample.tokens.tolist()}
        entry |= {} if score is None else {"score": score}
        entries.append(entry | ({"caption": sample.caption} if sample.caption else {}))
    return entries


if __name__ == "__main__":
    sys.exit(main())
