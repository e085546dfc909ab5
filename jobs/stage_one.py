"""The part that `train_dvae` and `train_vqvae` share: check, claim, train on the workers."""

from dataclasses import asdict
from typing import Any

from jobs.claimed_training import train_once, training_run
from jobs.configs.stage_one import TrainStageOneJob
from jobs.picture_training import train_on_pictures
from pipelines.data.stage import Manifest
from pipelines.training.picture_loader import PictureBatch
from pipelines.training.run_directory import run_tags
from pipelines.training.stage_one_stage import StageOneStage, model_file, run_stage_one
from pipelines.training.weights import build_stage_one, stage_one_kind


def describe(job: TrainStageOneJob) -> list[str]:
    """What a dry run says."""
    import torch

    with torch.device("meta"):
        model = build_stage_one(job.model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    pictures = job.training.steps * job.training.batch_samples
    return [
        f"{parameters:,} parameters; {job.model.image_size} px to a grid of "
        f"{job.model.grid}×{job.model.grid} of {job.model.vocab_size:,} codes",
        # fp32: weights, gradients, two moments, average.
        f"{20 * parameters / 1e9:,.2f} GB of state on each of {job.workers.num_workers} workers",
        f"{pictures:,} pictures in {job.training.steps:,} updates",
        f"{job.loaders.per_worker * job.workers.num_workers} processes that make the batches",
    ]


def train(job: TrainStageOneJob) -> dict[str, Any]:
    """Check the input, claim the output, train on the workers."""
    manifest = Manifest.load(job.filtered, stage="filter_pairs")
    kind = stage_one_kind(job.model)
    settings = {kind: asdict(job.model), "training": asdict(job.training)}
    inputs = {"filtered": manifest.digest}
    return train_once(
        model_file(job.output, job.model),
        stage=f"train_{kind}",
        settings=settings,
        inputs=inputs,
        train=lambda: _train(job, settings, inputs),
    )


def _train(job: TrainStageOneJob, settings: dict[str, Any], inputs: dict[str, str]) -> None:
    with training_run(
        job.tracking,
        job.output,
        stage=f"train_{stage_one_kind(job.model)}",
        steps=job.training.steps,
        settings=settings,
        tags=run_tags(inputs, {"filtered": job.filtered}),
        shown=("hard_elb", "gap", "perplexity", "images_per_second"),
    ) as uri:
        # The workers' own directory is elsewhere.
        stage = StageOneStage(
            output=job.output.resolve(),
            filtered=job.filtered.resolve(),
            config=job.model,
            training=job.training,
            cadence=job.cadence,
            tracking_uri=uri,
            watchdog=job.watchdog,
        )
        train_on_pictures(run_stage_one, stage, PictureBatch.unpack, job.workers, job.loaders)
