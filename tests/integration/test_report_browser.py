"""The data report as a reader has it: in a real browser, light, dark and on a phone."""

import io
import itertools
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipelines.data.report import write_report
from pipelines.data.schema import DROPPED, FILTERED, RAW, tokens_schema
from pipelines.data.stage import DatasetWriter, Manifest
from pipelines.data.storage import sha256_file
from pipelines.training.weights import load_stage_one
from tests.fixtures.browser import look_at
from tests.fixtures.datasets import CORPUS, filtered_row, tiny_dvae

SCRIPT = "<script>document.title='owned'</script><img src=http://evil.example/x.png>"
BROKEN_IMAGES = "[...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).length"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
QUESTIONS = [
    "document.images.length",
    BROKEN_IMAGES,
    "document.title",
    "document.body.innerText",
    "document.querySelectorAll('script, iframe, a, link, form').length",
    OVERFLOW,
    "[...document.images].filter(i => !i.alt).length",
    "[...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])",
    "getComputedStyle(document.body).backgroundColor",
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    corpus = pq.read_table(CORPUS, columns=["caption", "image"]).slice(0, 60).to_pylist()
    rows = [filtered_row(row["caption"], row["image"]) for row in corpus]
    rows[0]["caption"] = SCRIPT
    for number, row in enumerate(rows):
        row["url"] = f"http://host{number % 5}.example/{number}.png"
    twins = [row | {"key": f"twin{number}"} for number, row in enumerate([rows[1]] * 3)]
    near = [rows[2] | {"key": f"near{number}"} for number in range(2)]
    raw = _dataset(
        folder / "raw",
        "download_pairs",
        [*rows, *twins, *near],
        [_drop(rows[4], "http_404", "404")] * 3,
        {"urls": "1" * 64},
    )
    filtered = _dataset(
        folder / "filtered",
        "filter_pairs",
        rows[:50],
        [_drop(row, "short_caption", SCRIPT) for row in rows[50:]]
        + [_drop(row, "duplicate_picture", str(row["sha256"])[:12]) for row in twins]
        + [_drop(row, "near_duplicate", str(rows[2]["key"])) for row in near],
        {"raw": raw.digest},
    )
    write_report(folder / "report.html", [raw, filtered, _tokens(folder, filtered)])
    return folder / "report.html"


@pytest.mark.parametrize(
    ("width", "dark"), [(1200, False), (1200, True), (390, False)], ids=["light", "dark", "phone"]
)
def test_a_browser_shows_every_picture_and_runs_and_loads_nothing(
    page: Path, width: int, dark: bool
) -> None:
    seen = look_at(page, QUESTIONS, width=width, dark=dark)
    images, broken, title, text, active, overflow, nameless, levels, ground = seen.values
    assert images > 50
    assert broken == 0
    assert title == "encode pairs · data report"
    assert SCRIPT in text  # as text
    assert active == 0
    assert overflow <= 0
    assert nameless == 0
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert (ground == "rgb(18, 22, 31)") == dark
    assert seen.requests == [page.resolve().as_uri()]
    assert seen.complaints == []
    colours = Image.open(io.BytesIO(seen.screenshot)).convert("RGB").getcolors(1 << 24)
    assert colours is not None
    assert len(colours) > 100  # something was painted
    (page.parent / f"{width}-{dark}.png").write_bytes(seen.screenshot)


def test_the_sections_are_there_with_what_they_are_about(page: Path) -> None:
    (text,) = look_at(page, ["document.body.innerText"]).values
    for heading in ("Funnel", "Duplicate clusters", "Top hosts", "Reconstructions", "Lineage"):
        assert f"\n{heading}\n" in text
    assert "3 dropped: the same bytes" in text
    assert "2 dropped: nearly the same picture" in text
    assert "host0.example" in text


def test_the_policy_of_the_page_stops_what_would_get_past_the_escaping(page: Path) -> None:
    """The page as it would be if a caption did become markup."""
    torn = page.with_name("torn.html")
    torn.write_text(page.read_text().replace("</h1>", f"</h1>{SCRIPT}", 1))
    seen = look_at(torn, ["document.title"])
    assert seen.values == ["encode pairs · data report"]
    assert any("Content Security Policy" in complaint for complaint in seen.complaints)
    assert any("img-src" in complaint for complaint in seen.complaints)
    assert any("script" in complaint for complaint in seen.complaints)


def _tokens(folder: Path, filtered: Manifest) -> Manifest:
    dvae = folder / "dvae.safetensors"
    digest = tiny_dvae(dvae, image_size=64, vocab_size=128)
    model, _ = load_stage_one(dvae)
    torch.manual_seed(0)
    schema = tokens_schema(8, stage_one="dvae", dvae_sha256=digest, tokenizer_sha256="0" * 64)
    rows = filtered.read("00000", ["key", "caption", "split"]).to_pylist()
    for row in rows:
        codes = torch.randint(model.config.vocab_size, (64,)).numpy().astype("<u2")
        row |= {"image_tokens": codes.tobytes(), "crop_size": 128, "crop_left": 0, "crop_top": 0}
    writer = DatasetWriter(
        path=folder / "tokens",
        stage="encode_pairs",
        config={},
        inputs={"filtered": filtered.digest, "dvae": sha256_file(dvae)},
        sources={"dvae": str(dvae)},
        shards=["00000"],
    )
    writer.claim()
    table = pa.Table.from_pylist(rows, schema=schema)
    writer.commit("00000", table, DROPPED.empty_table(), rows_in=len(rows), schema=schema)
    return writer.seal()


def _dataset(
    path: Path, stage: str, rows: list[dict], dropped: list[dict], inputs: dict[str, str]
) -> Manifest:
    writer = DatasetWriter(
        path=path, stage=stage, config={}, inputs=inputs, sources={}, shards=["00000"]
    )
    writer.claim()
    schema = RAW if stage == "download_pairs" else FILTERED
    kept = pa.Table.from_pylist(rows, schema=schema)
    lost = pa.Table.from_pylist(dropped, schema=DROPPED)
    writer.commit("00000", kept, lost, rows_in=len(rows) + len(dropped), schema=schema)
    return writer.seal()


def _drop(row: dict, reason: str, detail: str) -> dict:
    return {name: row[name] for name in ("key", "url", "caption")} | {
        "reason": reason,
        "detail": detail,
    }
