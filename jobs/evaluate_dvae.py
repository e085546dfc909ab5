"""Judge a dVAE or a VQ-VAE on pictures: → OUTPUT/reconstruction.json, report.html and grid.png."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from jobs import runtime
from jobs.claimed_output import make_once
from jobs.configs.evaluate_dvae import PRESETS, EvaluateDVAEJob
from jobs.progress import Progress
from pipelines.data.stage import Manifest
from pipelines.data.storage import Location, canonical_json, replace_file, sha256_file
from pipelines.evaluation import frechet, reconstruction, reconstruction_report
from pipelines.evaluation.reconstruction import Judgement
from pipelines.sampling.grid import png
from pipelines.sampling.loading import torch_device
from pipelines.training import tracking
from pipelines.training.run_directory import run_tags
from pipelines.training.weights import STAGE_ONE, load_stage_one, read_header, stage_one_config

STAGE = "evaluate_dvae"
FIGURES = "reconstruction.json"
REPORT = "report.html"
GRID = "grid.png"
NAMES = {"dvae": "dVAE", "vqvae": "VQ-VAE"}


def main(argv: Sequence[str] | None = None) -> int:
    return runtime.run_job(STAGE, PRESETS, evaluate_dvae, argv, describe)


def describe(job: EvaluateDVAEJob) -> list[str]:
    """The lines below the config of a dry run."""
    manifest, kind, count = _check(job)
    distance = frechet.NAME if job.reconstruction.frechet else f"no {frechet.NAME}"
    return [
        f"judge {job.dvae}, a {kind}, on {count:,} of {manifest.rows_out:,} pictures of "
        f"{job.filtered}, with {distance}",
        f"write {', '.join(str(job.output / name) for name in (FIGURES, REPORT, GRID))}",
    ]


def evaluate_dvae(job: EvaluateDVAEJob) -> dict[str, Any]:
    """Check the inputs, judge, write the figures last."""
    manifest, kind, count = _check(job)
    inputs = {"filtered": manifest.digest, "dvae": sha256_file(job.dvae)}
    if job.reconstruction.frechet:
        inputs["feature_network"] = frechet.WEIGHTS_SHA256
    make_once(
        job.output / FIGURES,
        stage=STAGE,
        settings=asdict(job.reconstruction),
        inputs=inputs,
        make=lambda: _evaluate(job, manifest, kind, count, inputs),
    )
    content = json.loads((job.output / FIGURES).read_bytes())
    figures: dict[str, Any] = content["figures"]
    return figures | {"pictures": content["pictures"], "report": job.output / REPORT}


def _check(job: EvaluateDVAEJob) -> tuple[Manifest, str, int]:
    """The pictures, the model's kind and the number of pictures, or a refusal in words."""
    manifest = Manifest.load(job.filtered, stage="filter_pairs")
    header = read_header(job.dvae, *STAGE_ONE)
    if job.reconstruction.frechet:
        frechet.check_weights()
    count = job.reconstruction.check(manifest, stage_one_config(header))
    torch_device(job.device)
    return manifest, str(header["kind"]), count


def _evaluate(
    job: EvaluateDVAEJob, manifest: Manifest, kind: str, count: int, inputs: dict[str, str]
) -> None:
    parents: dict[str, Path | Location] = {"filtered": job.filtered, "dvae": job.dvae.parent}
    with (
        tracking.open_run(
            job.tracking,
            stage=STAGE,
            settings=asdict(job.reconstruction),
            tags=run_tags(inputs, parents),
            directory=job.output,
            uri=runtime.tracking_uri(),
        ) as tracker,
        Progress(STAGE, count, "pictures") as progress,
    ):
        model, _ = load_stage_one(job.dvae)
        device = torch_device(job.device)
        judgement = reconstruction.measure(
            model.to(device),
            manifest,
            job.reconstruction,
            batch_samples=job.batch_samples,
            on_rows=progress.advance,
        )
        facts = _facts(device, kind, inputs)
        for note in reconstruction_report.notes(judgement):
            print(f"{STAGE}: {note}", flush=True)
        _write_pictures(job, judgement, facts, tracker)
        tracker.log_metrics(judgement.figures, step=0)
        # Last: it says that the job is done.
        replace_file(job.output / FIGURES, canonical_json(_content(judgement, facts, inputs)))


def _write_pictures(
    job: EvaluateDVAEJob, judgement: Judgement, facts: dict[str, str], tracker: tracking.Tracker
) -> None:
    grid = reconstruction_report.grid(judgement)
    replace_file(job.output / GRID, png(grid))
    reconstruction_report.write_report(
        job.output / REPORT,
        judgement,
        title=f"{NAMES[facts['kind']]}, {len(judgement.code_counts):,} codes",
        facts={"model": str(job.dvae), "pictures": str(job.filtered)} | facts,
        training_beta=job.reconstruction.training_beta,
    )
    tracker.log_image("reconstructions", grid, step=0)
    tracker.log_file(job.output / REPORT)


def _facts(device: torch.device, kind: str, inputs: dict[str, str]) -> dict[str, str]:
    """What a figure must be reported with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "kind": kind,
        "precision": "networks in float32 (no TF32), PSNR, SSIM and statistics in float64",
        "device": name,
        "torch": torch.__version__,
    } | {f"{what} digest": digest for what, digest in inputs.items()}


def _content(judgement: Judgement, facts: dict[str, str], inputs: dict[str, str]) -> dict[str, Any]:
    return {
        "figures": judgement.figures,
        "standard_errors": judgement.standard_errors,
        "pictures": judgement.pictures,
        "unusable": judgement.unusable,
        "notes": reconstruction_report.notes(judgement),
        "digests": inputs,
        **{name: facts[name] for name in ("kind", "precision", "device", "torch")},
    }


if __name__ == "__main__":
    sys.exit(main())
