"""What a dry run expects against what the run then does."""

import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs import download_pairs, filter_pairs
from pipelines.data import estimates
from pipelines.data.encoding_config import EncodingConfig
from pipelines.data.filtering import FilterConfig, filter_shard
from pipelines.data.picture_blocks import cut_sample
from pipelines.data.schema import RAW
from pipelines.data.stage import Manifest
from pipelines.data.urls import pair_key
from tests.fixtures.datasets import filtered_pairs, write_dataset

ROWS = 6000


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Rows of which about 12 % are too small, 5 % too long and 20 % have too short a caption."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(ROWS):
        caption = "a red chair" if random.random() < 0.2 else f"a red chair beside table {number}"
        caption = "chair" if caption == "a red chair" else caption
        size = 100 if random.random() < 0.12 else 400
        url = f"http://a.example/{number}"
        rows.append(
            {
                "key": pair_key(url, caption),
                "url": url,
                "caption": caption,
                "image": random.bytes(int(random.integers(200, 2000))),
                "width": size,
                "height": size,
                "original_width": size * 3 if random.random() < 0.05 else size,
                "original_height": size,
                "sha256": f"{number:064x}",
            }
        )
    rows.sort(key=lambda row: str(row["key"]))
    table = pa.Table.from_pylist(rows, schema=RAW)
    path = tmp_path_factory.mktemp("estimates") / "raw"
    return write_dataset(path, "download_pairs", table, inputs={}, rows_per_shard=500)


def run(raw: Manifest) -> tuple[pa.Table, pa.Table]:
    return filter_shard(pa.concat_tables(raw.tables()), FilterConfig(), ())


def test_a_real_run_is_within_the_interval(raw: Manifest) -> None:
    found = estimates.estimate(
        estimates.sample_of(raw).cast(RAW),
        raw.rows_out,
        lambda rows: filter_shard(rows, FilterConfig(), ()),
    )
    kept, dropped = run(raw)
    assert found.sample == estimates.SAMPLE_ROWS
    assert found.kept.low <= kept.num_rows <= found.kept.high
    reasons = dropped["reason"].to_pylist()
    assert set(found.dropped) == set(reasons)
    for reason, rows in found.dropped.items():
        assert rows.low <= reasons.count(reason) <= rows.high, reason
        assert rows.high - rows.low < 0.1 * ROWS  # a range that says something
    assert found.bytes_kept.low <= kept.nbytes <= found.bytes_kept.high
    assert found.core_seconds > 0


def test_the_interval_holds_the_truth_in_19_of_20_samples() -> None:
    random = np.random.default_rng(1)
    for share in (0.02, 0.3, 0.9):
        inside = 0
        for count in random.binomial(400, share, size=1000):
            interval = estimates.proportion(int(count), 400, 10**6)
            inside += interval.low <= share <= interval.high
        assert 930 <= inside <= 975


def test_the_whole_is_no_estimate() -> None:
    assert estimates.proportion(3, 4, 4) == estimates.Range(0.75, 0.75, 0.75)
    assert estimates.proportion(0, 400, 10**6).high < 0.01
    assert estimates.mean([5.0]).high == math.inf
    assert estimates.mean([]) == estimates.Range(0, 0, 0)


def test_the_dry_run_of_the_filter_says_what_to_expect(
    raw: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["paper", "--raw", str(raw.path), "--output", str(tmp_path / "out"), "--dry-run"]
    assert filter_pairs.main(line) == 0
    said = capsys.readouterr().out
    assert "expected of 6,000 rows, from 400 sampled (95 % intervals):" in said
    match = re.search(r"kept: [\d,]+ \(([\d,]+) to ([\d,]+)\)", said)
    assert match
    low, high = (int(number.replace(",", "")) for number in match.groups())
    assert low <= run(raw)[0].num_rows <= high
    assert "in 12 shards" in said
    assert not (tmp_path / "out").exists()


def test_the_dry_run_of_a_download_asks_nobody_unless_it_is_told_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "urls.csv").write_text(
        "url,caption\n" + "".join(f"ftp://a.example/{n},a dog\n" for n in range(50))
    )
    line = ["paper", "--urls", str(tmp_path / "urls.csv"), "--output", str(tmp_path / "out")]
    assert download_pairs.main([*line, "--dry-run"]) == 0
    assert "expected of" not in capsys.readouterr().out
    assert download_pairs.main([*line, "--dry-run", "--dry-run-sample", "20"]) == 0
    said = capsys.readouterr().out
    assert "expected of 50 rows, from 20 sampled" in said
    assert "  kept: 0 (0 to " in said
    assert download_pairs.main([*line, "--dry-run", "--dry-run-sample", "-1"]) == 2


def test_the_pictures_that_stage_one_cannot_use_are_foreseen(tmp_path: Path) -> None:
    manifest = filtered_pairs(tmp_path / "filtered", rows=40)
    for side, kept in ((64, 40), (256, 0)):
        found = estimates.estimate(
            estimates.sample_of(manifest),
            manifest.rows_out,
            partial(cut_sample, config=EncodingConfig(), image_size=side),
        )
        assert found.kept == estimates.Range(kept, kept, kept)
        assert list(found.dropped) == ([] if kept else ["too_small"])


def test_a_sample_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        estimates.estimate(RAW.empty_table(), 10, lambda rows: (rows, rows))
