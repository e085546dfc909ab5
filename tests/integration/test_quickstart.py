"""The whole way at a small size, in a process of its own, undisturbed and killed."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.data.stage import Manifest
from tests.fixtures.ports import free_port

DATASETS = ("raw", "filtered", "tokens")
BEFORE_STAGE_ONE = ("raw", "filtered", "tokenizer")
# Enough of the dVAE's that its metrics are there before its end; of the others, that they are made.
STEPS = ("--dvae-steps", "30", "--prior-steps", "10", "--clip-steps", "4")
SECONDS = 540
# Killed in the middle of these files' lives: any moment will do, one a stage is tried.
LANDMARKS = ("raw/commits/*.json", "dvae/metrics.jsonl", "tokens/plan.json")


@pytest.fixture(scope="module")
def web_port() -> int:
    return free_port()


def line(output: Path, web_port: int, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "jobs.quickstart", "smoke"),
        *("--output", str(output), "--web-port", str(web_port), "--port", str(free_port())),
        *STEPS,
        *more,
    ]


def run(output: Path, web_port: int, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        line(output, web_port, *more), capture_output=True, text=True, timeout=SECONDS, check=False
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, web_port: int) -> Path:
    output = tmp_path_factory.mktemp("quickstart") / "out"
    done = run(output, web_port)
    assert done.returncode == 0, done.stdout + done.stderr
    return output


def begun(undisturbed: Path, output: Path) -> Path:
    """A run that has all that comes before stage one."""
    for name in BEFORE_STAGE_ONE:
        shutil.copytree(undisturbed / name, output / name)
    return output


def test_the_summary_holds_every_figure(undisturbed: Path) -> None:
    summary = json.loads((undisturbed / "summary.json").read_text())
    raw = summary["stages"]["download_pairs"]
    assert raw["rows_in"] == 57
    assert raw["rows_in"] == raw["rows_out"] + sum(raw["dropped"].values())
    filtered = summary["stages"]["filter_pairs"]
    assert filtered["rows_in"] == raw["rows_out"]
    assert filtered["rows_out"] == 48
    assert summary["stages"]["encode_pairs"]["rows_out"] == 48
    assert set(raw["dropped"]) >= {"http_404", "forbidden_scheme", "duplicate_pair"}
    assert set(filtered["dropped"]) >= {"aspect_ratio", "not_english", "boilerplate"}
    for name in ("image_loss", "image_loss_shuffled_captions", "retrieval_at_1"):
        assert isinstance(summary[name], float)
    assert summary["served"]["status"] == 200
    assert len(set(summary["mlflow_runs"].values())) == 9
    for file in ("evaluation/grid.png", "served.png", "tokens/report.html"):
        assert (undisturbed / file).stat().st_size > 0


def test_a_second_run_does_nothing_again(undisturbed: Path, web_port: int) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.safetensors")}
    done = run(undisturbed, web_port)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nothing to do") == 9
    after = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.safetensors")}
    assert before == after


def test_a_killed_run_resumes_to_the_same_digests(
    undisturbed: Path, web_port: int, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    rng = random.Random(7)
    for landmark in LANDMARKS:
        with (tmp_path / "log").open("a") as log:
            process = subprocess.Popen(
                line(output, web_port, "--until", "encode_pairs"), stdout=log, stderr=log
            )
            deadline = time.monotonic() + SECONDS
            while not list(output.glob(landmark)) and process.poll() is None:
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(rng.uniform(0.05, 0.3))  # polling for the landmark's file
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    done = run(output, web_port, "--until", "encode_pairs")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in DATASETS:
        expected, found = Manifest.load(undisturbed / name), Manifest.load(output / name)
        assert found.rows_in == found.rows_out + sum(found.dropped.values())
        assert found.digest == expected.digest, name


def test_ctrl_c_in_a_training_ends_with_its_own_code(
    undisturbed: Path, web_port: int, tmp_path: Path
) -> None:
    output = begun(undisturbed, tmp_path / "out")
    more = ("--until", "train_dvae", "--dvae-steps", "100000")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            line(output, web_port, *more), stdout=log, stderr=log, start_new_session=True
        )
        deadline = time.monotonic() + SECONDS
        while not (output / "dvae/metrics.jsonl").exists() and process.poll() is None:
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)  # polling for the first metrics
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        code = process.wait(timeout=SECONDS)
    said = (tmp_path / "log").read_text()
    assert code == 130, said
    assert "interrupted; run the same line again to go on" in said
    assert not (output / "dvae/dvae.safetensors").exists()


def test_a_taken_port_is_said_before_anything_is_done(tmp_path: Path, web_port: int) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        arguments = [*line(tmp_path / "out", web_port), "--port", str(port)]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"127.0.0.1:{port} is not" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_vqvae_in_the_dvaes_place_goes_the_whole_way(
    undisturbed: Path, web_port: int, tmp_path: Path
) -> None:
    output = begun(undisturbed, tmp_path / "out")
    done = run(output, web_port, "--stage-one", "vqvae", "--dvae-steps", "10")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("nothing to do") == len(BEFORE_STAGE_ONE)
    summary = json.loads((output / "summary.json").read_text())
    assert summary["served"]["status"] == 200
    assert summary["stages"]["encode_pairs"]["rows_out"] == 48
    tokens = Manifest.load(output / "tokens")
    metadata = tokens.read(tokens.shards[0].shard).schema.metadata
    assert metadata[b"manray.stage_one"] == b"vqvae"
    assert not (output / "dvae").exists()
