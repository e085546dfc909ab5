"""Train the autoregressive prior on token shards: Ray Train, FSDP2."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs import runtime, workers
from jobs.claimed_training import train_once, training_run
from jobs.configs.train_prior import PRESETS, TrainPriorJob
from jobs.plan_table import does_not_fit, plan_lines
from pipelines.data.stage import Manifest
from pipelines.data.storage import Location, sha256_file
from pipelines.data.tokenizer import CaptionTokenizer
from pipelines.training.prior_stage import PRIOR_FILE, PriorStage, run_prior_stage
from pipelines.training.run_directory import run_tags
from pipelines.training.token_loader import check_inputs
from pipelines.training.training_plan import plan_training
from pipelines.training.weights import STAGE_ONE, read_header


def main(argv: Sequence[str] | None = None) -> int:
    return runtime.run_job("train_prior", PRESETS, train, argv, describe)


def describe(job: TrainPriorJob) -> list[str]:
    """What a dry run says; ValueError if the training does not fit."""
    on_gpus = job.workers.device != "cpu"
    plan = plan_training(
        job.prior,
        job.training,
        job.workers.num_workers,
        job.plan,
        device="cuda" if on_gpus else "cpu",
    )
    lines = plan_lines(plan)
    if on_gpus and (problem := does_not_fit(plan)):
        print("\n".join(lines))
        raise ValueError(problem)
    return lines


def train(job: TrainPriorJob) -> dict[str, Any]:
    """Check the inputs, claim the output, train on the workers."""
    manifest = Manifest.load(job.tokens, stage="encode_pairs")
    read_header(job.dvae, *STAGE_ONE)
    check_inputs(
        manifest,
        job.prior,
        CaptionTokenizer.from_file(job.tokenizer),
        dvae_digest=sha256_file(job.dvae),
    )
    settings = {"prior": asdict(job.prior), "training": job.training.settings()}
    inputs = {"tokens": manifest.digest} | manifest.inputs
    return train_once(
        job.output / PRIOR_FILE,
        stage="train_prior",
        settings=settings,
        inputs=inputs,
        train=lambda: _train(job, settings, inputs),
    )


def _train(job: TrainPriorJob, settings: dict[str, Any], inputs: dict[str, str]) -> None:
    parents: dict[str, Path | Location] = {
        "tokens": job.tokens,
        "dvae": job.dvae.parent,
        "tokenizer": job.tokenizer.parent,
    }
    layout = {f"layout.{name}": str(value) for name, value in job.training.layout().items()}
    with training_run(
        job.tracking,
        job.output,
        stage="train_prior",
        steps=job.training.steps,
        settings=settings,
        tags=run_tags(inputs, parents) | layout,
        shown=("image_loss", "text_loss"),
    ) as uri:
        stage = PriorStage(
            output=job.output.resolve(),
            tokens=job.tokens.resolve(),
            tokenizer=job.tokenizer.resolve(),
            dvae=job.dvae.resolve(),
            prior=job.prior,
            training=job.training,
            cadence=job.cadence,
            tracking_uri=uri,
            watchdog=job.watchdog,
        )
        workers.train_on_workers(_work, {"stage": stage}, job.workers, job.output)


def _work(argument: dict[str, Any]) -> None:
    worker = workers.this_worker()
    run_prior_stage(
        argument["stage"],
        device=worker.device,
        rank=worker.rank,
        world_size=worker.world_size,
        is_machine_leaving=workers.PreemptionNotices(),
    )


if __name__ == "__main__":
    sys.exit(main())
