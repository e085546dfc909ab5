"""Train the discrete VAE on filtered pictures: Ray Train, data parallel."""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from jobs import runtime, workers
from jobs.configs.train_dvae import PRESETS, TrainDVAEJob
from jobs.progress import FollowMetrics
from pipelines.data import plan
from pipelines.data.stage import Manifest
from pipelines.data.storage import sha256_file
from pipelines.training import tracking
from pipelines.training.dvae_loop import train_dvae
from pipelines.training.picture_loader import PictureLoader
from pipelines.training.run_directory import read_result, run_tags, write_result
from pipelines.training.weights import save_model

MODEL_FILE = "dvae.safetensors"


def main(argv: Sequence[str] | None = None) -> int:
    return runtime.run_job("train_dvae", PRESETS, train, argv, describe)


def describe(job: TrainDVAEJob) -> list[str]:
    """What a dry run says."""
    import torch

    from models.dvae import DVAE

    with torch.device("meta"):
        model = DVAE(job.dvae)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    pictures = job.training.steps * job.training.batch_samples
    return [
        f"{parameters:,} parameters; {job.dvae.image_size} px to a grid of "
        f"{job.dvae.grid}×{job.dvae.grid} of {job.dvae.vocab_size:,} codes",
        # fp32: weights, gradients, two moments, average.
        f"{20 * parameters / 1e9:,.2f} GB of state on each of {job.workers.num_workers} workers",
        f"{pictures:,} pictures in {job.training.steps:,} updates",
    ]


def train(job: TrainDVAEJob) -> dict[str, Any]:
    """Check the input, claim the output, train on the workers."""
    manifest = Manifest.load(job.filtered, stage="filter_pairs")
    model_file = job.output / MODEL_FILE
    settings = {"dvae": asdict(job.dvae), "training": asdict(job.training)}
    inputs = {"filtered": manifest.digest}
    with plan.lease(job.output):
        plan.claim(job.output, stage="train_dvae", config=settings, inputs=inputs)
        if model_file.exists():
            runtime.nothing_to_do(model_file)
        else:
            _train(job, settings, inputs)
    return {"model": str(model_file), "sha256": sha256_file(model_file)} | read_result(job.output)


def _train(job: TrainDVAEJob, settings: dict[str, Any], inputs: dict[str, str]) -> None:
    uri = runtime.tracking_uri()
    with (
        runtime.ray_session(),
        tracking.open_run(
            job.tracking,
            stage="train_dvae",
            settings=settings,
            tags=run_tags(inputs, {"filtered": job.filtered}),
            directory=job.output,
            uri=uri,
        ) as tracker,
        FollowMetrics(
            job.output / tracking.METRICS_FILE,
            "train_dvae",
            job.training.steps,
            ("hard_elb", "perplexity"),
        ),
    ):
        # The workers' own directory is elsewhere.
        job = replace(job, output=job.output.resolve(), filtered=job.filtered.resolve())
        argument = {"job": job, "uri": uri, "run_id": tracker.run_id}
        workers.train_on_workers(_work, argument, job.workers, job.output)


def _work(argument: dict[str, Any]) -> None:
    """One worker's part; rank 0 writes metrics, pictures, the result and the model."""
    job: TrainDVAEJob = argument["job"]
    worker = workers.this_worker()
    started = time.monotonic()
    is_first = worker.rank == 0
    manifest = Manifest.load(job.filtered, stage="filter_pairs")
    loader = PictureLoader(
        manifest,
        job.training.crops,
        image_size=job.dvae.image_size,
        batch_samples=job.training.batch_samples,
        seed=job.training.seed,
        rank=worker.rank,
        world_size=worker.world_size,
    )
    desk = tracking.Tracker(job.output, argument["uri"], argument["run_id"]) if is_first else None
    result: dict[str, Any] = {"steps": job.training.steps}

    def log(step: int, metrics: dict[str, float]) -> None:
        result.update({name: round(value, 5) for name, value in metrics.items()})
        if desk:
            desk.log_metrics(metrics | {"unusable_pictures": loader.unusable}, step)

    def resume(step: int, said: list[str]) -> None:
        if desk:
            desk.rewind(step)
            for line in said:
                print(line, flush=True)

    def show(step: int, pictures: dict[str, np.ndarray]) -> None:
        if desk:
            desk.log_image("reconstructions", _grid(pictures), step)

    weights = train_dvae(
        job.dvae,
        job.training,
        cadence=job.cadence,
        loader=loader,
        device=worker.device,
        rank=worker.rank,
        world_size=worker.world_size,
        checkpoints=job.output / "checkpoints",
        on_log=log,
        on_resume=resume,
        on_images=show,
    )
    if is_first:
        write_result(
            job.output, result | {"training_seconds": round(time.monotonic() - started, 1)}
        )
        save_model(
            job.output / MODEL_FILE,
            kind="dvae",
            config=job.dvae,
            state=weights,
            metadata={"filtered_digest": manifest.digest, "training": asdict(job.training)},
        )


def _grid(pictures: dict[str, np.ndarray]) -> np.ndarray:
    """Rows of originals, hard and relaxed reconstructions, one column a picture."""
    return np.concatenate([np.concatenate(list(row), axis=1) for row in pictures.values()], axis=0)


if __name__ == "__main__":
    sys.exit(main())
