"""Import a reranker of open_clip: a checkpoint and its vocabulary → OUTPUT/clip.safetensors."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from jobs import runtime
from jobs.claimed_output import make_once
from jobs.configs.import_clip import PRESETS, ImportClipJob
from pipelines.data.open_clip_slots import OpenClipSlots
from pipelines.data.storage import replace_file, sha256_file
from pipelines.training import tracking
from pipelines.training.clip_files import CLIP_FILE, MERGES_FILE
from pipelines.training.open_clip_checkpoint import SOURCE, OpenClipCheckpoint, read_open_clip
from pipelines.training.run_directory import read_result, run_tags, write_result
from pipelines.training.weights import save_model

STAGE = "import_clip"


def main(argv: Sequence[str] | None = None) -> int:
    return runtime.run_job(STAGE, PRESETS, import_clip, argv, describe)


def describe(job: ImportClipJob) -> list[str]:
    """The lines below the config of a dry run."""
    config = _read(job).config
    return [
        f"read {job.checkpoint}: {config.image_size} px in patches of {config.patch_size}, "
        f"{config.image_layers} layers of {config.image_width} and {config.text_layers} of "
        f"{config.text_width}, {config.vocab_size:,} ids",
        f"write {job.output / CLIP_FILE}",
    ]


def import_clip(job: ImportClipJob) -> dict[str, Any]:
    """Write the model once; a finished output of the same files is left alone."""
    released = _read(job)
    model_file = job.output / CLIP_FILE
    settings = {"activation": job.activation, "image_heads": job.image_heads}
    inputs = {"checkpoint": sha256_file(job.checkpoint), "merges": sha256_file(job.merges)}
    make_once(
        model_file,
        stage=STAGE,
        settings=settings,
        inputs=inputs,
        make=lambda: _save(job, released, inputs),
    )
    return {"model": model_file, "sha256": sha256_file(model_file)} | read_result(job.output)


def _read(job: ImportClipJob) -> OpenClipCheckpoint:
    """Checkpoint and vocabulary, found to fit each other."""
    released = read_open_clip(
        job.checkpoint, activation=job.activation, image_heads=job.image_heads
    )
    OpenClipSlots.from_file(job.merges, released.config.vocab_size)
    return released


def _save(job: ImportClipJob, released: OpenClipCheckpoint, inputs: dict[str, str]) -> None:
    settings = {"activation": job.activation, "clip": asdict(released.config)}
    with tracking.open_run(
        job.tracking,
        stage=STAGE,
        settings=settings,
        tags=run_tags(inputs, {}),
        directory=job.output,
        uri=runtime.tracking_uri(),
    ) as tracker:
        result = {"parameters": sum(tensor.numel() for tensor in released.state.values())}
        tracker.log_metrics(result, step=0)
        write_result(job.output, result)
        replace_file(job.output / MERGES_FILE, job.merges.read_bytes())
        # Last: it says that the job is done.
        save_model(
            job.output / CLIP_FILE,
            kind="clip",
            config=released.config,
            state=released.state,
            metadata={
                "source": SOURCE,
                "checkpoint_sha256": inputs["checkpoint"],
                "merges_sha256": inputs["merges"],
            },
        )


if __name__ == "__main__":
    sys.exit(main())
