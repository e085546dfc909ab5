"""An operator's judge of pictures is asked about every one that is decoded, and fails closed."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from jobs import filter_pairs
from pipelines.data import nsfw
from pipelines.data.filtering import fingerprint_shard
from pipelines.data.nsfw import NsfwConfig
from pipelines.data.row_rules import RowRulesConfig
from pipelines.data.schema import RAW
from tests.fixtures.datasets import filtered_row

RULES = RowRulesConfig(min_side=1)
asked: list[int] = []


def redness(pictures: list[np.ndarray]) -> list[float]:
    """A judge that minds red."""
    asked.append(len(pictures))
    assert all(pixels.dtype == np.uint8 and pixels.shape[2] == 3 for pixels in pictures)
    return [float(pixels[..., 0].mean() / 255) for pixels in pictures]


def too_few(pictures: list[np.ndarray]) -> list[float]:
    return [0.0] * (len(pictures) - 1)


def not_a_number(pictures: list[np.ndarray]) -> list[float]:
    return [float("nan")] * len(pictures)


def words(pictures: list[np.ndarray]) -> list[str]:
    return ["fine"] * len(pictures)


def failing(pictures: list[np.ndarray]) -> list[float]:
    raise RuntimeError("the judge is ill")


def judge_of(name: str) -> NsfwConfig:
    return NsfwConfig(scorer=f"{__name__}:{name}", max_score=0.5)


def raw(reds: list[int]) -> pa.Table:
    rows = []
    for number, red in enumerate(reds):
        buffer = io.BytesIO()
        Image.new("RGB", (8 + number, 8), (red, 0, 0)).save(buffer, "PNG")
        row = filtered_row(f"a plain square of paint number {number}", buffer.getvalue())
        rows.append({name: row[name] for name in RAW.names})
    rows[1]["image"] = b"no picture"
    rows[2]["caption"] = "a dog"
    return pa.Table.from_pylist(rows, schema=RAW)


def test_what_the_judge_minds_is_dropped_with_its_score() -> None:
    asked.clear()
    table = raw([255 * (number % 2) for number in range(2 * nsfw.BATCH)])
    prints, dropped = fingerprint_shard(table, RULES, look=True, nsfw=judge_of("redness"))
    assert prints.num_rows + dropped.num_rows == table.num_rows
    reasons = dropped["reason"].to_pylist()
    odd = nsfw.BATCH - 1  # all odd rows, but for the one without a picture
    assert {reason: reasons.count(reason) for reason in reasons} == {
        "not_a_picture": 1,
        "short_caption": 1,
        "nsfw": odd,
    }
    assert "score 1.00" in dropped["detail"].to_pylist()
    assert asked == [nsfw.BATCH, nsfw.BATCH - 2]  # those only that were not dropped before


def test_without_a_judge_nothing_changes() -> None:
    table = raw([255, 0, 0, 255])
    prints, dropped = fingerprint_shard(table, RULES, look=True)
    assert (prints.num_rows, dropped.num_rows) == (2, 2)


@pytest.mark.parametrize("name", ["too_few", "not_a_number", "words"])
def test_an_answer_that_is_no_probability_ends_the_shard(name: str) -> None:
    with pytest.raises(ValueError, match="the nsfw scorer must answer"):
        fingerprint_shard(raw([0, 0, 0, 0]), RULES, look=True, nsfw=judge_of(name))


def test_a_judge_that_fails_ends_the_shard() -> None:
    with pytest.raises(RuntimeError, match="the judge is ill"):
        fingerprint_shard(raw([0, 0, 0, 0]), RULES, look=True, nsfw=judge_of("failing"))


def test_a_judge_that_is_not_there_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["tiny", "--raw", str(tmp_path / "raw"), "--output", str(tmp_path / "out")]
    assert filter_pairs.main([*line, "--nsfw.scorer", "no.such.module:judge"]) == 2
    assert "must be package.module:function, got 'no.such.module:judge'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="max_score must be in"):
        NsfwConfig(max_score=2)
