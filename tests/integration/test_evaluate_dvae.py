"""`jobs.evaluate_dvae` end to end on saved models and datasets."""

import base64
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from jobs import evaluate_dvae
from models.vqvae import VQVAE, VQVAEConfig
from pipelines.data.schema import FILTERED
from pipelines.data.storage import sha256_file
from pipelines.evaluation.frechet import WEIGHTS_SHA256
from pipelines.training.mlflow_run import run_id_of
from pipelines.training.weights import save_model
from tests.fixtures.datasets import (
    CORPUS,
    filtered_pairs,
    filtered_row,
    tiny_dvae,
    write_dataset,
)

ROWS = 20
SIDE = 64
ATTACKS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</bdi></figcaption><iframe src=//evil.example>",
    "{{ 7 * 7 }} {% raw %}",
    "' onmouseover='alert(1)",
]
FIGURES = {
    "hard_elb",
    "hard_elb_training_beta",
    "reconstruction",
    "kl",
    "psnr",
    "ssim",
    "codes_used",
    "share_of_codes_used",
    "perplexity",
}
DISTANCES = {"fd_effnetlite0", "fd_effnetlite0_halves", "fd_effnetlite0_across"}


class Page(HTMLParser):
    """All tags, attributes and texts of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def filtered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of the corpus under captions by strangers."""
    path = tmp_path_factory.mktemp("pairs") / "filtered"
    images = pq.read_table(CORPUS, columns=["image"])["image"].to_pylist()[:ROWS]
    rows = [filtered_row(f"{ATTACKS[i % 5]} nr {i}", image) for i, image in enumerate(images)]
    table = pa.Table.from_pylist(rows, schema=FILTERED)
    write_dataset(path, "filter_pairs", table, inputs={"raw": "0" * 64}, rows_per_shard=8)
    return path


@pytest.fixture(scope="module")
def dvae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dvae") / "dvae.safetensors"
    tiny_dvae(path, image_size=SIDE, vocab_size=128)
    return path


@pytest.fixture(scope="module")
def vqvae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vqvae") / "vqvae.safetensors"
    config = VQVAEConfig(
        image_size=SIDE, vocab_size=128, n_hid=8, n_init=8, n_blk_per_group=1, code_width=4
    )
    torch.manual_seed(0)
    save_model(path, kind="vqvae", config=config, state=VQVAE(config).state_dict(), metadata={})
    return path


def line(filtered: Path, model: Path, output: Path, *more: str) -> list[str]:
    return [
        *("tiny", "--filtered", str(filtered), "--dvae", str(model), "--output", str(output)),
        *("--device", "cpu", "--reconstruction.shown", "6", *more),
    ]


def contents(directory: Path) -> dict[str, bytes]:
    files = (file for file in directory.rglob("*") if file.is_file() and file.name != ".lock")
    return {file.name: file.read_bytes() for file in files}


def test_figures_a_page_and_a_grid_are_written_once(
    filtered: Path, dvae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert evaluate_dvae.main(line(filtered, dvae, output)) == 0
    printed = capsys.readouterr().out
    summary = json.loads(printed.splitlines()[-1])
    content = json.loads((output / "reconstruction.json").read_text())
    assert content["figures"].keys() == FIGURES | DISTANCES
    assert content["figures"].items() <= summary.items()
    assert (content["pictures"], content["unusable"], content["kind"]) == (ROWS, 0, "dvae")
    assert content["digests"]["dvae"] == sha256_file(dvae)
    assert content["digests"]["feature_network"] == WEIGHTS_SHA256
    assert content["device"] == "CPU"
    assert "20 pictures are few for FD-EffNetLite0" in printed
    assert Image.open(output / "grid.png").height > 15 * 96

    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    run = client.get_run(run_id_of(output))
    assert run.data.metrics["psnr"] == pytest.approx(content["figures"]["psnr"])
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"report.html", "images"} <= files

    before = contents(output)
    assert evaluate_dvae.main(line(filtered, dvae, output)) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert evaluate_dvae.main(line(filtered, dvae, output, "--reconstruction.seed", "1")) == 2
    assert "other settings" in capsys.readouterr().err
    assert contents(output) == before


def test_a_page_runs_nothing_and_loads_nothing_whatever_the_captions(
    filtered: Path, vqvae: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    more = ("--reconstruction.no-frechet", "--reconstruction.shown", str(ROWS))
    assert evaluate_dvae.main(line(filtered, vqvae, output, *more)) == 0
    content = json.loads((output / "reconstruction.json").read_text())
    assert content["figures"].keys() == FIGURES
    assert content["digests"].keys() == {"filtered", "dvae"}
    page = Page(output / "report.html")
    assert not {"script", "iframe", "object", "link", "form", "a"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert len(sources) == 3 * 3 * ROWS  # three groups of all, three pictures each
    for source in sources:
        data = re.fullmatch(r"data:image/webp;base64,([A-Za-z0-9+/=]+)", source)
        assert data
        assert Image.open(io.BytesIO(base64.b64decode(data[1]))).size == (SIDE, SIDE)
    for number in range(ROWS):
        assert f"{ATTACKS[number % 5]} nr {number}" in page.text
    policies = [value for name, value in page.attributes if name == "content"]
    assert any("default-src 'none'" in policy for policy in policies)
    assert "VQ-VAE, 128 codes" in page.text
    assert sha256_file(vqvae) in page.text
    assert "FD-EffNetLite0" not in page.text  # not measured, not told


def test_a_killed_judgement_is_begun_anew_and_ends_in_the_same_figures(
    filtered: Path, dvae: Path, tmp_path: Path
) -> None:
    more = ("--reconstruction.no-frechet",)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert evaluate_dvae.main(line(filtered, dvae, whole, *more)) == 0
    assert evaluate_dvae.main(line(filtered, dvae, broken, *more)) == 0
    (broken / "reconstruction.json").unlink()  # it is written last
    assert evaluate_dvae.main(line(filtered, dvae, broken, *more)) == 0
    figures = (whole / "reconstruction.json").read_bytes()
    assert (broken / "reconstruction.json").read_bytes() == figures


def test_what_cannot_be_judged_is_refused_and_nothing_is_written(
    filtered: Path, dvae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filtered_pairs(tmp_path / "three", rows=3)
    foreign = tmp_path / "other.safetensors"
    foreign.write_bytes(b"nothing")
    for line_, said in [
        (line(tmp_path, dvae, tmp_path / "out"), "finished dataset"),
        (line(tmp_path / "three", dvae, tmp_path / "out"), "at least 4 pictures, got 3"),
        (line(filtered, tmp_path / "none", tmp_path / "out"), "there is none"),
        (line(filtered, foreign, tmp_path / "out"), "must be a safetensors file"),
        (line(filtered, dvae, tmp_path / "out", "--batch-samples", "0"), "at least 1, got 0"),
    ]:
        assert evaluate_dvae.main(line_) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_names_the_work_and_writes_nothing(
    filtered: Path, vqvae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--dry-run", "--reconstruction.most-pictures", "10")
    assert evaluate_dvae.main(line(filtered, vqvae, tmp_path / "out", *more)) == 0
    printed = capsys.readouterr().out
    assert "a vqvae, on 10 of 20 pictures" in printed
    assert "with FD-EffNetLite0" in printed
    assert not (tmp_path / "out").exists()
