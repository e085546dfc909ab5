"""Make pictures for prompts: → OUTPUT/prompt-*.png, samples.png and samples.json."""

import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from jobs import runtime
from jobs.configs.sample import PRESETS, SampleJob
from jobs.progress import Progress
from pipelines.data import plan
from pipelines.data.storage import canonical_json, replace_file
from pipelines.sampling.api import png
from pipelines.sampling.engine import Sample, Sampler
from pipelines.sampling.grid import captioned_rows
from pipelines.sampling.loading import CheckedFiles, ModelFiles, check_files, load_sampler
from pipelines.training import tracking
from pipelines.training.run_directory import run_tags

STAGE = "sample"
GRID = "samples.png"
RECORD = "samples.json"


def main(argv: Sequence[str] | None = None) -> int:
    return runtime.run_job(STAGE, PRESETS, sample, argv, describe)


def describe(job: SampleJob) -> list[str]:
    """The lines below the config of a dry run."""
    prompts = read_prompts(job)
    return [
        f"sample {len(prompts) * job.pictures_per_prompt} pictures for {len(prompts)} prompts",
        f"write {job.output / GRID}",
    ]


def sample(job: SampleJob) -> dict[str, Any]:
    """Check prompts and files, sample, write; a finished output with these settings stays."""
    prompts = read_prompts(job)
    files = ModelFiles(tokenizer=job.tokenizer, dvae=job.dvae, prior=job.prior)
    checked = check_files(files)
    sampler = load_sampler(files, device=job.device, max_candidates=job.max_candidates)
    job.sampling.check(checked.prior.image_vocab_size)
    for prompt in prompts:
        sampler.check_prompt(prompt)
    settings = {
        "prompts": prompts,
        "pictures_per_prompt": job.pictures_per_prompt,
        "seed": job.seed,
        "sampling": asdict(job.sampling),
    }
    with plan.lease(job.output):
        plan.claim(job.output, stage=STAGE, config=settings, inputs=checked.digests)
        if (job.output / RECORD).exists():
            runtime.nothing_to_do(job.output / GRID)
        else:
            _sample(job, prompts, checked, sampler, settings)
    return {
        "prompts": len(prompts),
        "pictures": len(prompts) * job.pictures_per_prompt,
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


def _sample(
    job: SampleJob,
    prompts: list[str],
    checked: CheckedFiles,
    sampler: Sampler,
    settings: dict[str, Any],
) -> None:
    parents = {"prior": job.prior.parent, "dvae": job.dvae.parent}
    with tracking.open_run(
        job.tracking,
        stage=STAGE,
        settings=settings,
        tags=run_tags(checked.digests, parents),
        directory=job.output,
        uri=runtime.tracking_uri(),
    ) as tracker:
        rows = _sample_all(job, prompts, sampler, checked.prior.image_len)
        record = [
            {"prompt": prompt, "pictures": _write_pictures(job.output, number, prompt, samples)}
            for number, (prompt, samples) in enumerate(zip(prompts, rows, strict=True))
        ]
        grid = captioned_rows(
            [
                (prompt, [sample.pixels for sample in samples])
                for prompt, samples in zip(prompts, rows, strict=True)
            ]
        )
        replace_file(job.output / GRID, png(grid))
        tracker.log_image("samples", grid, step=0)
        # Last: it says that the job is done.
        replace_file(job.output / RECORD, canonical_json(record))


def _sample_all(
    job: SampleJob, prompts: list[str], sampler: Sampler, image_len: int
) -> list[list[Sample]]:
    total = len(prompts) * job.pictures_per_prompt * image_len
    with Progress(STAGE, total, "image tokens") as progress:

        def advance(done: int, tokens: Tensor) -> None:
            progress.advance(len(tokens))

        return sampler.sample(
            prompts,
            n=job.pictures_per_prompt,
            seed=job.seed,
            sampling=job.sampling,
            on_progress=advance,
        )


def _write_pictures(
    output: Path, number: int, prompt: str, samples: list[Sample]
) -> list[dict[str, Any]]:
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40]
    entries = []
    for sample in samples:
        name = f"prompt-{number:02d}-{words}-seed-{sample.seed}.png".replace("--", "-")
        replace_file(output / name, png(sample.pixels))
        entries.append({"file": name, "seed": sample.seed, "tokens": sample.tokens.tolist()})
    return entries


if __name__ == "__main__":
    sys.exit(main())
