"""download_pairs on a real Ray: a network that dies, and what failed fetched again."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from jobs import download_pairs
from pipelines.data.report import lineage
from pipelines.data.stage import Manifest
from tests.fixtures.evil_web import EvilServer, running_evil_web

ROWS_PER_SHARD = 16


@pytest.fixture
def server() -> Iterator[EvilServer]:
    with running_evil_web() as server:
        buffer = io.BytesIO()
        Image.new("RGB", (40, 50), "teal").save(buffer, "PNG")
        server.picture = buffer.getvalue()
        yield server


def arguments(output: Path) -> list[str]:
    # More processors a shard than the cluster has: one shard at a time, and the job says so.
    return [
        "tiny", "--output", str(output), "--download.rows-per-shard", str(ROWS_PER_SHARD),
        "--download.collapse.window", "8", "--download.fetch.retries", "0",
        "--cpus-per-shard", "64",
    ]  # fmt: skip


def url_list(path: Path, urls: list[str]) -> list[str]:
    path.write_text("".join(f"{url}\ta dog\n" for url in urls))
    return ["--urls", str(path)]


def test_a_dead_network_stops_the_job_and_the_same_line_goes_on(
    ray_cluster: None, server: EvilServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = url_list(tmp_path / "l.txt", [server.url(f"/picture?{n}") for n in range(64)])
    line = [*arguments(tmp_path / "raw"), *urls]
    server.alive_answers = 2 * ROWS_PER_SHARD
    assert download_pairs.main(line) == 1
    said = capsys.readouterr()
    assert "the network seems to be down: 8 of the last 8 fetches" in said.err
    assert "Traceback" not in said.err
    assert "a task is to have 64 CPUs, but no node has more than" in said.out
    records = [json.loads(file.read_bytes()) for file in (tmp_path / "raw/commits").iterdir()]
    assert [record["dropped"] for record in records] == [{}, {}]

    server.alive_answers = 1 << 60
    assert download_pairs.main(line) == 0
    manifest = Manifest.load(tmp_path / "raw")
    assert (manifest.rows_out, manifest.dropped) == (64, {})
    assert download_pairs.main([*arguments(tmp_path / "undisturbed"), *urls]) == 0
    assert Manifest.load(tmp_path / "undisturbed").digest == manifest.digest


def test_what_failed_is_fetched_again_into_a_new_dataset(
    ray_cluster: None, server: EvilServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [f"/{kind}?{n}" for kind in ("picture", "outage", "none") for n in range(20)]
    urls = url_list(tmp_path / "l.txt", [server.url(path) for path in paths])
    assert download_pairs.main([*arguments(tmp_path / "raw"), *urls]) == 0
    old = Manifest.load(tmp_path / "raw")
    assert old.dropped == {"http_404": 20, "http_503": 20}

    server.recovered = True
    retry = [*arguments(tmp_path / "raw-2"), "--retry-of", str(tmp_path / "raw")]
    assert download_pairs.main([*retry, "--retry-failed", "5xx", "--dry-run"]) == 0
    assert "fetch 20 of 40 dropped rows" in capsys.readouterr().out
    assert download_pairs.main([*retry, "--retry-failed", "5xx"]) == 0
    new = Manifest.load(tmp_path / "raw-2")
    assert (new.rows_in, new.rows_out, new.dropped) == (60, 40, {"http_404": 20})
    assert new.inputs == {"raw": old.digest}
    assert [made.digest for made in lineage(new)] == [old.digest, new.digest]
    assert old.digest in (tmp_path / "raw-2" / "report.html").read_text()
    assert {path: server.asked[path] for path in paths} == {
        path: 2 if path.startswith("/outage") else 1 for path in paths
    }
    assert Manifest.load(tmp_path / "raw").digest == old.digest
    assert download_pairs.main([*retry, "--retry-failed", "dns"]) == 2
    other_size = [*retry, "--download.resize.short-side", "50"]
    assert download_pairs.main(other_size) == 2
    assert "must store pictures as" in capsys.readouterr().err
    onto_itself = ["tiny", "--output", str(tmp_path / "raw"), "--retry-of", str(tmp_path / "raw")]
    assert download_pairs.main(onto_itself) == 2
