"""Import OpenAI's released dVAE: encoder.pkl and decoder.pkl → OUTPUT/dvae.safetensors."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from jobs import runtime
from jobs.claimed_output import make_once
from jobs.configs.import_dvae import PRESETS, ImportDVAEJob
from models.dvae import DVAE
from pipelines.data.storage import sha256_file
from pipelines.training import tracking
from pipelines.training.released_dvae import ReleasedDVAE, read_released, save_released
from pipelines.training.run_directory import read_result, run_tags, write_result

STAGE = "import_dvae"
MODEL_FILE = "dvae.safetensors"


def main(argv: Sequence[str] | None = None) -> int:
    return runtime.run_job(STAGE, PRESETS, import_dvae, argv, describe)


def describe(job: ImportDVAEJob) -> list[str]:
    """The lines below the config of a dry run; the files are checked, all but their weights."""
    config = _read(job).config
    model_file = job.output / MODEL_FILE
    return [
        f"read {job.encoder} and {job.decoder}: {config.vocab_size:,} codes, n_hid {config.n_hid}, "
        f"n_init {config.n_init}, {config.n_blk_per_group} blocks in each group",
        f"{config.image_size} px to a grid of {config.grid}×{config.grid}",
        f"write {model_file}" + (" (it is there already)" if model_file.exists() else ""),
    ]


def import_dvae(job: ImportDVAEJob) -> dict[str, Any]:
    """Write the model once; a finished output of the same files is left alone."""
    released = _read(job)
    model_file = job.output / MODEL_FILE
    settings = {"image_size": job.image_size}
    inputs = {"encoder": sha256_file(job.encoder), "decoder": sha256_file(job.decoder)}
    # A file with a weight that is not finite is refused before the output is touched.
    model = None if model_file.exists() else released.load()
    make_once(
        model_file,
        stage=STAGE,
        settings=settings,
        inputs=inputs,
        make=lambda: _save(job, released, model or released.load(), inputs),
    )
    return {"model": model_file, "sha256": sha256_file(model_file)} | read_result(job.output)


def _read(job: ImportDVAEJob) -> ReleasedDVAE:
    return read_released(job.encoder, job.decoder, image_size=job.image_size)


def _save(job: ImportDVAEJob, released: ReleasedDVAE, model: DVAE, inputs: dict[str, str]) -> None:
    settings = {"image_size": job.image_size, "dvae": asdict(released.config)}
    with tracking.open_run(
        job.tracking,
        stage=STAGE,
        settings=settings,
        tags=run_tags(inputs, {}),
        directory=job.output,
        uri=runtime.tracking_uri(),
    ) as tracker:
        result = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
        tracker.log_metrics(result, step=0)
        write_result(job.output, result)
        # Last: it says that the job is done.
        save_released(job.output / MODEL_FILE, model, inputs)


if __name__ == "__main__":
    sys.exit(main())
