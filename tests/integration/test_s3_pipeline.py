"""From a URL list to token shards with every dataset in a real S3 server, on a real Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import check_shards, data_status
from pipelines.corpus.web import CorpusWeb
from pipelines.data.stage import Manifest
from pipelines.data.storage import Location
from tests.fixtures.datasets import tiny_dvae
from tests.fixtures.s3_server import S3Server

PICTURES = 24
DATASETS = ("raw", "filtered", "tokens")
ROOT = Path(__file__).parents[2]
# The jobs share a Ray that knows the server from its start: the tests' own does not.
LINE = """
import importlib, json, sys
from jobs.ray_session import shared_ray
with shared_ray():
    for verb, *arguments in json.load(sys.stdin):
        if code := importlib.import_module(f"jobs.{verb}").main(["tiny", *arguments]):
            sys.exit(code)
"""


def run(server: S3Server, *jobs: list[str]) -> str:
    """The jobs one after another, in a process of its own; what they said."""
    done = subprocess.run(
        [sys.executable, "-c", LINE],
        cwd=ROOT,
        env=os.environ | server.environment,
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_datasets_in_s3_are_those_on_disk(
    s3_server: S3Server, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dvae, tokenizer = tmp_path / "dvae.safetensors", tmp_path / "tokenizer"
    tiny_dvae(dvae, image_size=64, vocab_size=128)
    models = ("--dvae", str(dvae), "--tokenizer", str(tokenizer / "tokenizer.json"))
    local, store = Location(tmp_path / "local"), Location(f"s3://{bucket}/run")
    with CorpusWeb(0, PICTURES) as web:
        urls = str(web.url_list(tmp_path / "urls.parquet"))
        jobs = []
        for place in (local, store):
            raw, filtered, tokens = (str(place / name) for name in DATASETS)
            jobs += [
                ["download_pairs", "--urls", urls, "--output", raw],
                ["filter_pairs", "--raw", raw, "--output", filtered],
                ["train_tokenizer", "--filtered", filtered, "--output", str(tokenizer)],
                ["encode_pairs", "--filtered", filtered, "--output", tokens, *models],
            ]
        run(s3_server, *jobs)
        digests = {name: Manifest.load(store / name).digest for name in DATASETS}
        assert digests == {name: Manifest.load(local / name).digest for name in DATASETS}
        said = run(s3_server, ["download_pairs", "--urls", urls, "--output", str(store / "raw")])
    assert "nothing to do" in said
    assert json.loads(said.splitlines()[-1])["manifest_digest"] == digests["raw"]
    for name in DATASETS:
        assert (store / name / "report.html").exists()
        assert check_shards.main([str(store / name)]) == 0
    capsys.readouterr()
    assert data_status.main([str(store / "tokens"), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["sealed"]
    assert sum(shard["rows_out"] for shard in status["shards"]) == PICTURES
