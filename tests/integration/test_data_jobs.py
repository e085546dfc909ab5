"""download_pairs and filter_pairs end to end on a real Ray, from a small web on loopback."""

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from jobs import download_pairs, filter_pairs
from pipelines.corpus.web import CorpusWeb
from pipelines.data.stage import Manifest
from pipelines.data.urls import pair_key
from pipelines.training.tracking import Tracker
from tests.fixtures.judges import brightness

PICTURES = 40
DOWNLOAD_REASONS = {
    "http_404": 1,
    "broken_picture": 1,
    "not_a_picture": 1,
    "duplicate_pair": 1,
    "forbidden_scheme": 1,
}
FILTER_REASONS = {"aspect_ratio": 1, "not_english": 1, "boilerplate": 1, "duplicate_picture": 1}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def web() -> Iterator[CorpusWeb]:
    with CorpusWeb(0, PICTURES) as web:
        yield web


@pytest.fixture(scope="module")
def urls(web: CorpusWeb, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return web.url_list(tmp_path_factory.mktemp("list") / "urls.parquet")


@pytest.fixture(scope="module")
def raw(ray_cluster: None, urls: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The list, downloaded without disturbance."""
    output = tmp_path_factory.mktemp("data") / "raw"
    assert download_pairs.main(download_arguments(urls, output)) == 0
    return output


@pytest.fixture(scope="module")
def filtered(raw: Path) -> Path:
    output = raw.parent / "filtered"
    assert filter_pairs.main(filter_arguments(raw, output)) == 0
    return output


def download_arguments(urls: Path, output: Path, rows_per_shard: int = 16) -> list[str]:
    rows = ["--download.rows-per-shard", str(rows_per_shard)]
    return ["tiny", "--urls", str(urls), "--output", str(output), *rows]


def filter_arguments(raw: Path, output: Path) -> list[str]:
    return ["tiny", "--raw", str(raw), "--output", str(output)]


def snapshot(path: Path) -> dict[str, bytes]:
    """All files but the lock, which names its last holder."""
    files = (file for file in path.rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def summary_of(output: str) -> dict[str, object]:
    summary: dict[str, object] = json.loads(output.strip().splitlines()[-1])
    return summary


def test_every_good_pair_is_kept_and_every_loss_has_its_reason(
    web: CorpusWeb, raw: Path, filtered: Path
) -> None:
    first, second = Manifest.load(raw), Manifest.load(filtered)
    assert first.rows_in == PICTURES + len(web.bad_rows)
    assert first.dropped == DOWNLOAD_REASONS
    assert second.dropped == FILTER_REASONS
    for manifest in (first, second):
        assert manifest.rows_in == manifest.rows_out + sum(manifest.dropped.values())
    assert second.rows_in == first.rows_out
    captions = [
        caption for table in second.tables(["caption"]) for caption in table["caption"].to_pylist()
    ]
    assert sorted(captions) == sorted(row["caption"] for row in web.rows)


def test_no_key_is_lost_or_doubled_between_kept_and_dropped(web: CorpusWeb, raw: Path) -> None:
    manifest = Manifest.load(raw)
    keys = [key for table in manifest.tables(["key"]) for key in table["key"].to_pylist()]
    for shard in manifest.shards:
        keys += manifest.read_dropped(shard.shard)["key"].to_pylist()
    wanted = [
        pair_key(f"http://127.0.0.1:{web.port}/emoji/{row['key']}.webp", row["caption"])
        for row in web.rows
    ]
    wanted += [pair_key(row.url, row.caption) for row in web.bad_rows]
    assert sorted(keys) == sorted(wanted)


def test_each_stage_leaves_a_report_of_its_lineage(raw: Path, filtered: Path) -> None:
    for output, digests in (
        (raw, [Manifest.load(raw).digest]),
        (filtered, [Manifest.load(raw).digest, Manifest.load(filtered).digest]),
    ):
        page = (output / "report.html").read_text()
        assert all(digest in page for digest in digests)


def test_a_second_run_changes_nothing_and_needs_no_ray(
    urls: Path, raw: Path, filtered: Path
) -> None:
    # Nobody listens there: the job would fail if it asked for Ray.
    environment = os.environ | {"RAY_ADDRESS": "127.0.0.1:9"}
    for verb, arguments, output in (
        ("download_pairs", download_arguments(urls, raw), raw),
        ("filter_pairs", filter_arguments(raw, filtered), filtered),
    ):
        before = snapshot(output)
        done = subprocess.run(
            [sys.executable, "-m", f"jobs.{verb}", *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "nothing to do" in done.stdout
        assert summary_of(done.stdout)["manifest_digest"] == Manifest.load(output).digest
        assert snapshot(output) == before


@pytest.mark.timeout(300)
def test_a_killed_driver_goes_on_to_the_same_digest(
    ray_cluster: None, urls: Path, tmp_path: Path
) -> None:
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    driver = subprocess.Popen(
        [sys.executable, "-m", "jobs.download_pairs", *download_arguments(urls, disturbed, 4)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    look_again = threading.Event()
    while not list(disturbed.glob("commits/*.json")):
        assert driver.poll() is None, "the driver ended before it was killed"
        look_again.wait(0.02)
    driver.kill()
    driver.wait()
    assert not (disturbed / "manifest.json").exists()

    assert download_pairs.main(download_arguments(urls, disturbed, 4)) == 0
    assert download_pairs.main(download_arguments(urls, undisturbed, 4)) == 0
    assert Manifest.load(disturbed).digest == Manifest.load(undisturbed).digest


def test_the_numbers_are_in_mlflow(
    ray_cluster: None,
    urls: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    arguments = download_arguments(urls, tmp_path / "raw", 100)
    assert download_pairs.main([*arguments, "--tracking.experiment", "pairs"]) == 0
    summary = summary_of(capsys.readouterr().out)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("pairs")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["rows_in"] == summary["rows_in"]
    assert run.data.metrics["dropped.http_404"] == 1
    assert run.data.tags["manifest_digest"] == summary["manifest_digest"]
    # What MLflow missed of a job that has ended is delivered by the next run of the same line.
    Tracker(tmp_path / "raw", uri).set_tags({"late": "yes"})
    assert download_pairs.main([*arguments, "--tracking.experiment", "pairs"]) == 0
    assert client.get_run(run.info.run_id).data.tags["late"] == "yes"


def test_other_settings_or_another_list_on_the_same_output_are_refused(
    urls: Path, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(raw)
    other_size = [*download_arguments(urls, raw), "--download.resize.short-side", "80"]
    assert download_pairs.main(other_size) == 2
    assert '"short_side": 80' in capsys.readouterr().err
    other_list = tmp_path / "other.csv"
    other_list.write_text("url,caption\nhttp://127.0.0.1/x.jpg,a dog\n")
    assert download_pairs.main(download_arguments(other_list, raw)) == 2
    assert "choose another --output" in capsys.readouterr().err.lower()
    assert snapshot(raw) == before


def test_the_operator_s_judge_is_asked_on_the_workers_and_fails_closed(
    raw: Path, filtered: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    scores = {
        row["key"]: brightness([np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB"))])[0]
        for table in Manifest.load(filtered).tables(["key", "image"])
        for row in table.to_pylist()
    }
    limit = sorted(scores.values())[len(scores) // 2] + 1e-6
    output = tmp_path / "judged"
    judge = ["--nsfw.scorer", "tests.fixtures.judges:brightness", "--nsfw.max-score", str(limit)]
    assert filter_pairs.main([*filter_arguments(raw, output), *judge]) == 0
    judged = Manifest.load(output)
    kept = {key for table in judged.tables(["key"]) for key in table["key"].to_pylist()}
    assert kept == {key for key, score in scores.items() if score <= limit}
    assert judged.dropped["nsfw"] >= len(scores) - len(kept) > 0

    output = tmp_path / "unjudged"
    judge = ["--nsfw.scorer", "tests.fixtures.judges:failing"]
    assert filter_pairs.main([*filter_arguments(raw, output), *judge]) != 0
    assert "the judge is ill" in capfd.readouterr().err
    assert not [*output.rglob("*.parquet")]


def test_a_missing_foreign_or_unfinished_input_is_refused_and_nothing_is_written(
    filtered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_text("mine")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "plan.json").write_text("{}")
    output = tmp_path / "output"
    for directory, words in (
        (tmp_path / "none", "must be a finished dataset"),
        (tmp_path / "photos", "is no dataset"),
        (tmp_path / "begun", "is not finished"),
        (filtered, "must be made by download_pairs or import_pairs, got filter_pairs"),
    ):
        assert filter_pairs.main(filter_arguments(directory, output)) == 2
        assert words in capsys.readouterr().err
        assert not output.exists()


def test_an_output_that_holds_something_else_is_left_alone(
    urls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "holiday.jpg").write_text("mine")
    assert download_pairs.main(download_arguments(urls, tmp_path)) == 2
    assert "holiday.jpg" in capsys.readouterr().err
    assert snapshot(tmp_path) == {"holiday.jpg": b"mine"}


def test_a_list_without_the_columns_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.csv").write_text("link,text\nx,y\n")
    assert download_pairs.main(download_arguments(tmp_path / "list.csv", tmp_path / "raw")) == 2
    assert "it has link, text" in capsys.readouterr().err
    assert not (tmp_path / "raw").exists()


def test_a_dry_run_writes_nothing(
    urls: Path, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert download_pairs.main([*download_arguments(urls, tmp_path / "a"), "--dry-run"]) == 0
    assert "in 4 shards, of which 4 are missing" in capsys.readouterr().out
    assert filter_pairs.main([*filter_arguments(raw, tmp_path / "b"), "--dry-run"]) == 0
    assert "in 4 shards, of which 4 are missing" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
