"""From a URL list to token shards with every dataset in a real S3 server, on a real Ray."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import check_shards, data_status
from pipelines.corpus.web import CorpusWeb
from pipelines.data.storage import Location
from tests.fixtures.datasets import tiny_dvae
from tests.fixtures.s3_server import S3Server

PICTURES = 24
ROOT = Path(__file__).parents[2]

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(s3_server: S3Server, private_directory: Path) -> Run:
    """A job in a process of its own, whose Ray's workers know the server too."""

    def job(verb: str, *arguments: object) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", f"jobs.{verb}", "tiny", *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | s3_server.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return summary

    return job


@pytest.mark.slow
def test_the_datasets_in_s3_are_those_on_disk(
    run: Run, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dvae = tmp_path / "dvae.safetensors"
    tiny_dvae(dvae, image_size=64, vocab_size=128)
    store = Location(f"s3://{bucket}/run")
    digests: dict[str, list[str]] = {}
    with CorpusWeb(0, PICTURES) as web:
        urls = web.url_list(tmp_path / "urls.parquet")
        for place in (Location(tmp_path / "local"), store):
            raw, filtered, tokens = place / "raw", place / "filtered", place / "tokens"
            tokenizer = tmp_path / "tokenizer"
            made = [
                run("download_pairs", "--urls", urls, "--output", raw),
                run("filter_pairs", "--raw", raw, "--output", filtered),
            ]
            run("train_tokenizer", "--filtered", filtered, "--output", tokenizer)
            models = ("--dvae", dvae, "--tokenizer", tokenizer / "tokenizer.json")
            made.append(run("encode_pairs", "--filtered", filtered, "--output", tokens, *models))
            digests[str(place)] = [summary["manifest_digest"] for summary in made]
    local, remote = digests.values()
    assert remote == local
    for name in ("raw", "filtered", "tokens"):
        assert (store / name / "report.html").exists()
        assert check_shards.main([str(store / name)]) == 0
    capsys.readouterr()
    assert data_status.main([str(store / "tokens"), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["sealed"]
    assert sum(shard["rows_out"] for shard in status["shards"]) == PICTURES
    again = run("download_pairs", "--urls", urls, "--output", store / "raw")
    assert again["manifest_digest"] == remote[0]
