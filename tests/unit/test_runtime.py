"""What every job does the same way: arguments, exit codes, the summary line."""

import errno
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from jobs import (
    deployment,
    download_pairs,
    encode_pairs,
    evaluate,
    evaluate_dvae,
    filter_pairs,
    quickstart,
    runtime,
    sample,
    serve_sampler,
    train_dvae,
    train_prior,
    train_tokenizer,
    train_vqvae,
)
from jobs.configs.job import Job
from models.prior import PriorConfig

VERBS = {
    "download_pairs": download_pairs,
    "filter_pairs": filter_pairs,
    "train_tokenizer": train_tokenizer,
    "train_dvae": train_dvae,
    "train_vqvae": train_vqvae,
    "encode_pairs": encode_pairs,
    "train_prior": train_prior,
    "sample": sample,
    "evaluate": evaluate,
    "evaluate_dvae": evaluate_dvae,
    "serve_sampler": serve_sampler,
    "quickstart": quickstart,
}


@dataclass(frozen=True, kw_only=True)
class PaintJob(Job):
    output: Path = Path("runs/paint")
    colours: int = 3
    prior: PriorConfig = field(default_factory=PriorConfig)


PRESETS = {"tiny": ("Small.", PaintJob()), "large": ("Large.", PaintJob(colours=9))}


def run(body: Any, *argv: str) -> int:
    return runtime.run_job("paint", PRESETS, body, argv, lambda job: [f"{job.colours} colours"])


def test_the_summary_is_one_json_line_last(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda job: {"output": job.output, "n": job.colours}, "tiny", "--colours", "4") == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["job"] == "paint"
    assert summary["n"] == 4
    assert summary["output"] == "runs/paint"
    assert summary["seconds"] >= 0


def test_a_dry_run_prints_settings_and_plan_and_runs_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def body(job: PaintJob) -> dict[str, Any]:
        raise AssertionError("ran")

    assert run(body, "large", "--dry-run") == 0
    out = capsys.readouterr().out
    assert '"colours": 9' in out
    assert out.endswith("9 colours\n")


def _raise(error: BaseException) -> Any:
    def body(job: PaintJob) -> dict[str, Any]:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("raw must be a dataset, got a cat"), 2, "paint: raw must be a dataset"),
        (FileNotFoundError("no such list"), 2, "paint: no such list"),
        (RuntimeError("boom"), 1, "paint: failed: RuntimeError: boom"),
        (OSError(errno.ENOSPC, "No space left", "/data/x"), 1, "the disk is full (/data/x)"),
        (KeyboardInterrupt(), 130, "run the same line again to go on"),
    ],
)
def test_errors_are_said_in_words_and_by_exit_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, words: str
) -> None:
    assert run(_raise(error), "tiny") == code
    assert words in capsys.readouterr().err


def test_an_unknown_preset_or_flag_is_a_usage_error_with_the_nearest_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ran: list[PaintJob] = []
    assert run(ran.append, "tinny") == 2
    assert "got 'tinny'; did you mean tiny?" in capsys.readouterr().err
    assert run(ran.append, "tiny", "--colour", "3") == 2
    assert "--colours" in capsys.readouterr().err
    assert run(ran.append) == 2
    assert "tiny" in capsys.readouterr().err
    assert run(ran.append, "tiny", "--prior.n-heads", "5", "--prior.d-model", "7") == 2
    said = " ".join(capsys.readouterr().err.split())  # tyro wraps at the terminal's width
    assert "d_model must divide by n_heads, got 7, 5" in said
    assert not ran


@pytest.mark.parametrize("verb", VERBS)
def test_every_job_has_help_and_refuses_unknown_presets(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main = VERBS[verb].main
    assert main(["--help"]) == 0
    presets = capsys.readouterr().out
    first = "tiny"
    assert first in presets
    assert main([first, "--help"]) == 0
    assert "--output" in capsys.readouterr().out
    assert main(["no-such-preset"]) == 2
    assert "must be one of" in capsys.readouterr().err


def test_a_missing_input_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    nothing = str(tmp_path / "nothing")
    lines = {
        download_pairs: ["--urls", nothing],
        filter_pairs: ["--raw", nothing],
        train_tokenizer: ["--filtered", nothing],
        train_dvae: ["--filtered", nothing],
        train_vqvae: ["--filtered", nothing],
        evaluate_dvae: ["--filtered", nothing, "--dvae", nothing],
        encode_pairs: ["--filtered", nothing, "--dvae", nothing, "--tokenizer", nothing],
        train_prior: ["--tokens", nothing, "--dvae", nothing, "--tokenizer", nothing],
        sample: ["--prior", nothing, "--dvae", nothing, "--tokenizer", nothing],
        evaluate: ["--prior", nothing, "--tokens", nothing, "--filtered", nothing],
        serve_sampler: ["--prior", nothing, "--dvae", nothing, "--tokenizer", nothing],
    }
    for job, arguments in lines.items():
        assert job.main(["tiny", "--output", str(out), *arguments]) == 2, job
        assert nothing in capsys.readouterr().err
        assert not out.exists(), job


@pytest.mark.parametrize(("stage_one", "other"), [("dvae", "vqvae"), ("vqvae", "dvae")])
def test_the_quickstart_says_the_lines_it_would_run(
    stage_one: str, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quickstart.main(["tiny", "--dry-run", "--stage-one", stage_one]) == 0
    out = capsys.readouterr().out
    for verb in VERBS:
        if verb not in ("serve_sampler", "quickstart", "evaluate_dvae", f"train_{other}"):
            assert f"python -m jobs.{verb} tiny --output runs/quickstart/" in out
    assert f"--dvae runs/quickstart/{stage_one}/{stage_one}.safetensors" in out
    assert f"jobs.train_{other}" not in out


def test_the_curl_line_names_the_endpoint() -> None:
    line = deployment.curl_line("http://127.0.0.1:8000", "it's a kite")
    assert "/v1/images/generations" in line
