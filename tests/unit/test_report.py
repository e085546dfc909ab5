"""The data report: hostile text stays text, and the numbers are the manifests' own."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from pipelines.data.report import write_report
from pipelines.data.schema import DROPPED, FILTERED, RAW
from pipelines.data.stage import DatasetWriter, Manifest
from tests.fixtures.datasets import filtered_row

ATTACKS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</figcaption><iframe src=//evil.example>",
    "javascript:alert(1)",
    "{{ 7 * 7 }} {% raw %}",
    "<svg/onload=alert(1)>",
    "&lt;b&gt; &amp; <!-- ",
    "' onmouseover='alert(1)",
]


class Tags(HTMLParser):
    """All tags, attributes and texts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def png(colour: str, side: int = 96) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def dataset(
    path: Path, stage: str, rows: list[dict], dropped: list[dict], inputs: dict[str, str]
) -> Manifest:
    writer = DatasetWriter(
        path=path, stage=stage, config={"x": "<b>"}, inputs=inputs, sources={}, shards=["00000"]
    )
    writer.claim()
    schema = RAW if stage == "download_pairs" else FILTERED
    writer.commit(
        "00000",
        pa.Table.from_pylist(rows, schema=schema),
        pa.Table.from_pylist(dropped, schema=DROPPED),
        rows_in=len(rows) + len(dropped),
        schema=schema,
    )
    return writer.seal()


def drop(row: dict, reason: str, detail: str = "") -> dict:
    return {name: row[name] for name in ("key", "url", "caption")} | {
        "reason": reason,
        "detail": detail,
    }


@pytest.fixture
def lineage(tmp_path: Path) -> list[Manifest]:
    rows = [filtered_row(f"{text} nr {n}", png("red", 60 + n)) for n, text in enumerate(ATTACKS)]
    for row in rows:
        row["url"] = f"http://a.example/{row['caption']}"
    raw = dataset(
        tmp_path / "raw",
        "download_pairs",
        rows,
        [drop(row | {"key": "k", "caption": None}, "<i>404", "<u>") for row in rows],
        {"urls": "1" * 64},
    )
    filtered = dataset(
        tmp_path / "filtered",
        "filter_pairs",
        rows[2:],
        [drop(row, "not_english", "<s>de") for row in rows[:2]],
        {"raw": raw.digest},
    )
    return [raw, filtered]


def test_hostile_captions_are_shown_as_text_and_nothing_is_loaded_or_run(
    tmp_path: Path, lineage: list[Manifest]
) -> None:
    write_report(tmp_path / "report.html", lineage)
    page = Tags((tmp_path / "report.html").read_text())
    assert not {"script", "iframe", "object", "link", "form", "a", "i", "u", "s"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert sources
    assert all(source.startswith("data:image/webp;base64,") for source in sources)
    for attack in ATTACKS:
        assert f"{attack} nr" in page.text
    policies = [value for name, value in page.attributes if name == "content"]
    assert any("default-src 'none'" in policy for policy in policies)


def test_the_pictures_are_encoded_anew_and_small(tmp_path: Path, lineage: list[Manifest]) -> None:
    write_report(tmp_path / "report.html", lineage)
    page = (tmp_path / "report.html").read_text()
    found = re.findall(r"data:image/webp;base64,([A-Za-z0-9+/=]+)", page)
    assert len(found) == 6 + 2  # kept ones, and those that the filter dropped
    for data in found:
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        assert picture.format == "WEBP"
        assert max(picture.size) <= 116


def test_the_funnel_says_what_the_manifests_say(tmp_path: Path, lineage: list[Manifest]) -> None:
    write_report(tmp_path / "report.html", lineage)
    text = " ".join(Tags((tmp_path / "report.html").read_text()).text.split())
    assert "download_pairs: 16 in = 8 kept + 8 dropped" in text
    assert "filter_pairs: 8 in = 6 kept + 2 dropped" in text
    for manifest in lineage:
        assert manifest.digest in text


def test_a_dataset_that_lost_everything_has_a_report(tmp_path: Path) -> None:
    row = filtered_row("a dog", png("red"))
    raw = dataset(tmp_path / "raw", "download_pairs", [], [drop(row, "http_404")], {"urls": "1"})
    write_report(tmp_path / "report.html", [raw])
    assert "1 in = 0 kept + 1 dropped" in " ".join(
        Tags((tmp_path / "report.html").read_text()).text.split()
    )


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one dataset"):
        write_report(tmp_path / "report.html", [])


def test_a_retry_counts_each_row_once(tmp_path: Path) -> None:
    rows = [filtered_row(f"a kite nr {n}", png("red", 60 + n)) for n in range(6)]
    lost = [drop(row, "http_503") for row in rows[2:]]
    old = dataset(tmp_path / "raw", "download_pairs", rows[:2], lost, {"urls": "1" * 64})
    new = dataset(tmp_path / "raw-2", "download_pairs", rows[:5], lost[3:], {"raw": old.digest})
    write_report(tmp_path / "report.html", [old, new])
    page = (tmp_path / "report.html").read_text()
    assert "Of 6 sampled rows" in page
    assert old.digest in page
    assert new.digest in page
