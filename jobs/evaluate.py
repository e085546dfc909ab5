"""Judge a prior on a corpus: → OUTPUT/evaluation.json and OUTPUT/grid.png."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs import runtime
from jobs.claimed_output import make_once
from jobs.configs.evaluate import PRESETS, EvaluateJob
from jobs.progress import Progress
from pipelines.data.storage import Location, canonical_json, replace_file
from pipelines.evaluation import protocol
from pipelines.evaluation.corpus import read_corpus
from pipelines.evaluation.inputs import JudgedInputs, checked_inputs
from pipelines.sampling.grid import png
from pipelines.sampling.loading import ModelFiles, load_sampler
from pipelines.training import tracking
from pipelines.training.run_directory import run_tags

STAGE = "evaluate"
GRID = "grid.png"
FIGURES = "evaluation.json"


def main(argv: Sequence[str] | None = None) -> int:
    return runtime.run_job(STAGE, PRESETS, evaluate, argv, describe)


def describe(job: EvaluateJob) -> list[str]:
    """The lines below the config of a dry run."""
    tokens = _check(job).tokens
    count = min(tokens.rows_out, job.evaluation.most_pictures)
    return [
        f"judge {job.prior} on {count:,} of {tokens.rows_out:,} pictures of {job.tokens}",
        f"write {job.output / FIGURES} and {job.output / GRID}",
    ]


def evaluate(job: EvaluateJob) -> dict[str, Any]:
    """Check that all inputs belong together, judge, write the figures last."""
    inputs = _check(job)
    job.evaluation.sampling.check(inputs.models.prior.image_vocab_size)
    make_once(
        job.output / FIGURES,
        stage=STAGE,
        settings=asdict(job.evaluation),
        inputs=inputs.digests,
        make=lambda: _evaluate(job, inputs),
    )
    figures: dict[str, Any] = json.loads((job.output / FIGURES).read_bytes())
    return figures | {"grid": job.output / GRID}


def _check(job: EvaluateJob) -> JudgedInputs:
    files = ModelFiles(tokenizer=job.tokenizer, dvae=job.dvae, prior=job.prior)
    return checked_inputs(job.tokens, job.filtered, files)


def _evaluate(job: EvaluateJob, inputs: JudgedInputs) -> None:
    parents: dict[str, Path | Location] = {
        "tokens": job.tokens,
        "prior": job.prior.parent,
        "dvae": job.dvae.parent,
    }
    with (
        tracking.open_run(
            job.tracking,
            stage=STAGE,
            settings=asdict(job.evaluation),
            tags=run_tags(inputs.digests, parents),
            directory=job.output,
            uri=runtime.tracking_uri(),
        ) as tracker,
        Progress(STAGE, job.evaluation.work(inputs.tokens.rows_out), "pictures") as progress,
    ):
        sampler = load_sampler(
            inputs.models.files, device=job.device, max_candidates=job.batch_samples
        )
        corpus = read_corpus(
            inputs.tokens,
            inputs.filtered,
            image_size=inputs.models.dvae.image_size,
            most=job.evaluation.most_pictures,
            split=job.evaluation.split,
        )
        result = protocol.evaluate(
            sampler,
            corpus,
            job.evaluation,
            batch_samples=job.batch_samples,
            on_rows=progress.advance,
        )
        replace_file(job.output / GRID, png(result.grid))
        tracker.log_metrics(result.figures, step=0)
        tracker.log_image("evaluation", result.grid, step=0)
        # Last: it says that the job is done.
        replace_file(job.output / FIGURES, canonical_json(result.figures))


if __name__ == "__main__":
    sys.exit(main())
