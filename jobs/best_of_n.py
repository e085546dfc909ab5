"""Measure what reranking gains: → OUTPUT/best-of-n.json, best-of-n.svg and best-of-n.png."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs import runtime
from jobs.claimed_output import make_once
from jobs.configs.best_of_n import PRESETS, BestOfNJob
from jobs.progress import Progress
from pipelines.data.storage import Location, canonical_json, replace_file, sha256_file
from pipelines.evaluation.best_of_n import Curve, best_of_n
from pipelines.evaluation.best_of_n_chart import best_of_n_chart
from pipelines.evaluation.corpus import read_corpus
from pipelines.evaluation.inputs import JudgedInputs, checked_inputs
from pipelines.sampling.grid import png
from pipelines.sampling.loading import ModelFiles, load_sampler, torch_device
from pipelines.sampling.reranking import load_reranker
from pipelines.training import tracking
from pipelines.training.run_directory import run_tags

STAGE = "best_of_n"
FIGURES, CHART, GRID = "best-of-n.json", "best-of-n.svg", "best-of-n.png"


def main(argv: Sequence[str] | None = None) -> int:
    return runtime.run_job(STAGE, PRESETS, measure, argv, describe)


def describe(job: BestOfNJob) -> list[str]:
    """The lines below the config of a dry run."""
    inputs = _check(job)
    prompts = min(job.best_of_n.prompts, inputs.tokens.rows_out)
    count = prompts * job.best_of_n.most_candidates
    return [
        f"sample {count:,} pictures for at most {prompts:,} prompts and rank them with {job.clip}",
        f"write {job.output / FIGURES}, {CHART} and {GRID}",
    ]


def measure(job: BestOfNJob) -> dict[str, Any]:
    """Check that all inputs belong together, measure, write the figures last."""
    inputs = _check(job)
    job.best_of_n.sampling.check(inputs.models.prior.image_vocab_size)
    digests = inputs.digests | {"clip": sha256_file(job.clip)}
    if job.judge is not None:
        digests["judge"] = sha256_file(job.judge)
        if digests["judge"] == digests["clip"]:
            raise ValueError(
                f"judge must be another model than the reranker, got {job.judge} twice"
            )
    make_once(
        job.output / FIGURES,
        stage=STAGE,
        settings=asdict(job.best_of_n),
        inputs=digests,
        make=lambda: _measure(job, inputs, digests),
    )
    curve: dict[str, Any] = json.loads((job.output / FIGURES).read_bytes())
    return curve | {"chart": job.output / CHART}


def _check(job: BestOfNJob) -> JudgedInputs:
    files = ModelFiles(tokenizer=job.tokenizer, dvae=job.dvae, prior=job.prior)
    for path in (job.clip, job.judge):
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"{path} must be a reranker: run jobs.train_clip first")
    return checked_inputs(job.tokens, job.filtered, files)


def _measure(job: BestOfNJob, inputs: JudgedInputs, digests: dict[str, str]) -> None:
    device = torch_device(job.device)
    reranker = load_reranker(job.clip, job.tokenizer, device)
    judge = None if job.judge is None else load_reranker(job.judge, job.tokenizer, device)
    parents: dict[str, Path | Location] = {
        "tokens": job.tokens,
        "prior": job.prior.parent,
        "dvae": job.dvae.parent,
        "clip": job.clip.parent,
    }
    settings = asdict(job.best_of_n)
    most = job.best_of_n.most_candidates
    total = min(job.best_of_n.prompts, inputs.tokens.rows_out) * most
    with (
        tracking.open_run(
            job.tracking,
            stage=STAGE,
            settings=settings,
            tags=run_tags(digests, parents),
            directory=job.output,
            uri=runtime.tracking_uri(),
        ) as tracker,
        Progress(STAGE, total, "pictures") as progress,
    ):
        sampler = load_sampler(
            inputs.models.files, device=job.device, max_candidates=job.max_candidates
        )
        corpus = read_corpus(
            inputs.tokens,
            inputs.filtered,
            image_size=inputs.models.dvae.image_size,
            most=job.best_of_n.most_pictures,
            split=job.best_of_n.split,
        )
        curve = best_of_n(
            sampler, reranker, corpus, job.best_of_n, judge=judge, on_pictures=progress.advance
        )
        replace_file(job.output / GRID, png(curve.grid))
        replace_file(job.output / CHART, best_of_n_chart(curve).encode())
        tracker.log_metrics(curve.figures(), step=0)
        tracker.log_image(STAGE, curve.grid, step=0)
        # Last: it says that the job is done.
        replace_file(job.output / FIGURES, canonical_json(_record(curve, settings, digests)))


def _record(curve: Curve, settings: dict[str, Any], digests: dict[str, str]) -> dict[str, Any]:
    return {
        "pools": curve.pools,
        "retrieval_at_1": curve.share,
        "half_width_95": curve.half_width,
        "possible": curve.possible,
        "prompts": curve.prompts,
        "corpus_pictures": curve.corpus_pictures,
        "settings": settings,
        "digests": digests,
    }


if __name__ == "__main__":
    sys.exit(main())
