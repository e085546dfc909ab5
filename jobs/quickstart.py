"""The whole way on real pictures, from a URL list to a live endpoint.

It runs the other jobs in order, in this process, as their command lines would. The one job that
knows other jobs.
"""

import base64
import json
import shlex
import socket
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs import deployment, runtime
from jobs.configs.quickstart import PRESETS, QuickstartJob
from jobs.configs.serve_sampler import ServeSamplerJob
from jobs.quickstart_line import DATASETS, PROMPTS, Clock, line_of, model_files, stages_of
from jobs.ray_session import shared_ray
from pipelines.corpus.web import CorpusWeb
from pipelines.data.stage import Manifest
from pipelines.data.storage import canonical_json, replace_file
from pipelines.training.mlflow_run import run_id_of


def main(argv: Sequence[str] | None = None) -> int:
    return runtime.run_job("quickstart", PRESETS, run, argv, describe)


def describe(job: QuickstartJob) -> list[str]:
    """The lines that would be run, as a person would type them."""
    return [
        shlex.join(["python", "-m", f"jobs.{stage.name}", *line_of(job, stage)])
        for stage in stages_of(job)
    ]


def run(job: QuickstartJob) -> dict[str, Any]:
    """Run every stage, serve the model, ask it for a picture, say where to look."""
    _check_port(job)
    job.output.mkdir(parents=True, exist_ok=True)
    clock = Clock(job.output / ".seconds.json")
    with CorpusWeb(job.web_port, job.pictures) as web, shared_ray():
        web.url_list(job.output / "urls.parquet")
        for stage in stages_of(job):
            print(f"\n── {stage.name}", flush=True)
            with clock.measure(stage.name):
                code = stage.main(line_of(job, stage))
            if code == 130:
                raise KeyboardInterrupt
            if code:
                raise SystemExit(code)
            if stage.name == job.until:
                return {"output": str(job.output), "until": job.until}
        print("\n── serve_sampler", flush=True)
        files = model_files(job)
        serving = ServeSamplerJob(
            output=job.output / "serving",
            tracking=job.tracking,
            port=job.port,
            tokenizer=files["tokenizer"],
            dvae=files["dvae"],
            prior=files["prior"],
            clip=files["clip"],
        )
        with deployment.serve_in_background(serving) as url:
            served = _ask(url, job.output / "served.png")
            summary = _summary(job, clock, served)
            replace_file(job.output / "summary.json", canonical_json(summary))
            _show(job, summary, url)
            if _keeps_serving(job):
                print("\nServing until you press Ctrl-C …", flush=True)
                _wait_for_interrupt()
    return {"output": str(job.output), "summary": str(job.output / "summary.json")}


def _check_port(job: QuickstartJob) -> None:
    """Say now, not in seven minutes, that the model could not be served."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", job.port))
        except OSError as error:
            raise ValueError(
                f"port must be free for the trained model, but 127.0.0.1:{job.port} is not "
                f"({error.strerror}): take another with --port"
            ) from error


def _ask(url: str, picture: Path) -> dict[str, Any]:
    """One real request; what came of it."""
    body = json.dumps({"prompt": PROMPTS[0], "n": 1, "seed": 0}).encode()
    request = urllib.request.Request(  # noqa: S310 (our own loopback address)
        f"{url}/v1/images/generations", body, {"Content-Type": "application/json"}
    )
    started = time.monotonic()
    with urllib.request.urlopen(request, timeout=120) as response:  # noqa: S310
        answer = json.load(response)
        status = response.status
    replace_file(picture, base64.b64decode(answer["data"][0]["b64_json"]))
    return {"status": status, "seconds": round(time.monotonic() - started, 2), "prompt": PROMPTS[0]}


def _summary(job: QuickstartJob, clock: Clock, served: dict[str, Any]) -> dict[str, Any]:
    """Everything that the run can be judged by."""
    stages: dict[str, Any] = {}
    runs = {}
    for stage in stages_of(job):
        directory = job.output / stage.directory
        stages[stage.name] = {"seconds": clock.seconds[stage.name]}
        if stage.directory in DATASETS:
            manifest = Manifest.load(directory, stage=stage.name)
            stages[stage.name] |= {
                "rows_in": manifest.rows_in,
                "rows_out": manifest.rows_out,
                "dropped": manifest.dropped,
                "manifest_digest": manifest.digest,
            }
        runs[stage.name] = run_id_of(directory)
    figures = json.loads((job.output / "evaluation" / "evaluation.json").read_bytes())
    return {
        "stages": stages,
        "seconds": round(sum(clock.seconds.values()), 1),
        **figures,
        "served": served,
        "mlflow_runs": runs,
    }


def _show(job: QuickstartJob, summary: dict[str, Any], url: str) -> None:
    console = Console()
    table = Table(title="What happened")
    for column in ("stage", "rows in", "kept", "dropped", "seconds"):
        table.add_column(column, justify="left" if column in ("stage", "dropped") else "right")
    for name, stage in summary["stages"].items():
        dropped = ", ".join(f"{reason} {n}" for reason, n in stage.get("dropped", {}).items())
        rows_in, rows_out = stage.get("rows_in", ""), stage.get("rows_out", "")
        table.add_row(name, str(rows_in), str(rows_out), dropped, f"{stage['seconds']:.1f}")
    console.print()
    console.print(table)
    for name in (
        "image_loss",
        "image_loss_shuffled_captions",
        "retrieval_at_1",
        "reconstruction_retrieval_at_1",
    ):
        console.print(f"{name:32s} {summary[name]:.3f}", highlight=False)
    uri = runtime.tracking_uri()
    bin_directory = Path(sys.executable).parent
    for label, value in {
        "samples": job.output / "evaluation" / "grid.png",
        "data report": job.output / "tokens" / "report.html",
        "figures": job.output / "summary.json",
        "experiment": f"{bin_directory}/mlflow ui --backend-store-uri {uri}",
        "ask it": deployment.curl_line(url, PROMPTS[0]),
    }.items():
        print(f"{label:12s} {value}", flush=True)


def _keeps_serving(job: QuickstartJob) -> bool:
    return job.keep_serving == "always" or (
        job.keep_serving == "on_terminal" and sys.stdout.isatty()
    )


def _wait_for_interrupt() -> None:
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print("stopped serving", flush=True)


if __name__ == "__main__":
    sys.exit(main())
