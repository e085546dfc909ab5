"""Train the contrastive model that reranks, on filtered pairs: Ray Train, data parallel."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs import runtime
from jobs.claimed_training import train_once, training_run
from jobs.configs.train_clip import PRESETS, TrainClipJob
from jobs.picture_training import train_on_pictures
from models.clip import count_parameters
from pipelines.data.stage import Manifest
from pipelines.data.storage import Location, sha256_file
from pipelines.data.tokenizer import CaptionTokenizer
from pipelines.training.clip_files import CLIP_FILE
from pipelines.training.clip_stage import ClipStage, run_clip
from pipelines.training.pair_loader import PairBatch
from pipelines.training.run_directory import run_tags
from pipelines.training.weights import STAGE_ONE, read_header, stage_one_config

STAGE = "train_clip"


def main(argv: Sequence[str] | None = None) -> int:
    return runtime.run_job(STAGE, PRESETS, train, argv, describe)


def describe(job: TrainClipJob) -> list[str]:
    """What a dry run says."""
    parameters = count_parameters(job.clip)
    pairs = job.training.steps * job.training.batch_samples
    share = job.training.batch_samples // job.workers.num_workers
    return [
        f"{parameters:,} parameters; {job.clip.image_size} px in {job.clip.patches} patches, "
        f"captions of {job.clip.text_len} slots",
        # fp32: weights, gradients, two moments, average.
        f"{20 * parameters / 1e9:,.2f} GB of state on each of {job.workers.num_workers} workers",
        f"{pairs:,} pairs in {job.training.steps:,} updates, {share:,} of each on a worker",
        f"{job.loaders.per_worker * job.workers.num_workers} processes that make the batches",
    ]


def train(job: TrainClipJob) -> dict[str, Any]:
    """Check the inputs, claim the output, train on the workers."""
    manifest = Manifest.load(job.filtered, stage="filter_pairs")
    tokenizer = CaptionTokenizer.from_file(job.tokenizer)
    if tokenizer.vocab_size > job.clip.vocab_size:
        raise ValueError(
            f"clip.vocab_size must be at least the tokenizer's {tokenizer.vocab_size}, "
            f"got {job.clip.vocab_size}"
        )
    inputs = {"filtered": manifest.digest, "tokenizer": tokenizer.digest} | _dvae(job)
    settings = {"clip": asdict(job.clip), "training": asdict(job.training)}
    return train_once(
        job.output / CLIP_FILE,
        stage=STAGE,
        settings=settings,
        inputs=inputs,
        train=lambda: _train(job, settings, inputs),
    )


def _dvae(job: TrainClipJob) -> dict[str, str]:
    """The digest of the model that redraws pictures, if one does."""
    if not job.training.redrawn:
        return {}
    side = stage_one_config(read_header(job.dvae, *STAGE_ONE)).image_size
    if side != job.clip.image_size:
        raise ValueError(
            f"clip.image_size must be {side}, that of {job.dvae}, which redraws pictures, got "
            f"{job.clip.image_size}: or give --training.redrawn 0"
        )
    return {"dvae": sha256_file(job.dvae)}


def _train(job: TrainClipJob, settings: dict[str, Any], inputs: dict[str, str]) -> None:
    parents: dict[str, Path | Location] = {
        "filtered": job.filtered,
        "tokenizer": job.tokenizer.parent,
    }
    if job.training.redrawn:
        parents["dvae"] = job.dvae.parent
    with training_run(
        job.tracking,
        job.output,
        stage=STAGE,
        steps=job.training.steps,
        settings=settings,
        tags=run_tags(inputs, parents),
        shown=("loss", "batch_accuracy", "images_per_second"),
    ) as uri:
        # The workers' own directory is elsewhere.
        stage = ClipStage(
            output=job.output.resolve(),
            filtered=job.filtered.resolve(),
            tokenizer=job.tokenizer.resolve(),
            dvae=job.dvae.resolve(),
            config=job.clip,
            training=job.training,
            cadence=job.cadence,
            tracking_uri=uri,
            watchdog=job.watchdog,
        )
        train_on_pictures(run_clip, stage, PairBatch.unpack, job.workers, job.loaders)


if __name__ == "__main__":
    sys.exit(main())
