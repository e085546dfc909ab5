"""The row rules over whole shards, against the same rules a row at a time."""

import random

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.row_rules import RowRulesConfig, judge
from tests.benchmarks.measure import Effort, Row, compare_speed
from tests.fixtures import row_by_row
from tests.fixtures.datasets import CORPUS

CONFIG = RowRulesConfig()
# The mix is ours, in hundredths: most captions pass, and pay for the language detector.
SCENES = ("in the old town", "on a wooden table near the window", "at sunset", "by the sea, 2014")
ENDS = (", photographed on 12 May 2009", " – stock photo", " by John Smith", " | café “Zürich”")
LOST = (
    *("IMG_20190512_101533.jpg", "photographed on 12 May 2009", "Photo by John Smith", "a dog"),
    *("ein roter Apfel auf einem Tisch", "un chat noir qui dort sur le canapé", "赤いりんご", ""),
    *("красное яблоко на столе", "© 2010 John Smith. All rights reserved.", "DSC00012"),
)


def rows(effort: Effort) -> list[Row]:
    """Captions as the web has them, no pictures; 3 % have sides that the first rule drops."""
    table = captions(effort.rows)
    pairs = table.to_pylist()
    expected = [row_by_row.drop_reason(row, CONFIG) or (None, None) for row in pairs]
    reasons, details = judge(table, CONFIG)
    assert list(zip(reasons.to_pylist(), details.to_pylist(), strict=True)) == expected
    asked = sum(reason in (None, "not_english") for reason, _ in expected)
    return [
        compare_speed(
            "filter-captions",
            peer="the same rules, a row at a time (re, cld3)",
            precision="exact",
            work=len(pairs),
            what="captions",
            ours=lambda: judge(table, CONFIG),
            theirs=lambda: [row_by_row.drop_reason(row, CONFIG) for row in pairs],
            repeats=effort.repeats,
            packages=("pyarrow", "cld3-py"),
            note=f"{asked / len(pairs):.0%} pass or are not English",
        ),
        compare_speed(
            "filter-captions-cld3",
            peer="cld3 alone, on every caption",
            precision="exact",
            work=len(pairs),
            what="captions",
            ours=lambda: judge(table, CONFIG),
            theirs=lambda: [row_by_row.detector().FindLanguage(row["caption"]) for row in pairs],
            repeats=effort.repeats,
            packages=("pyarrow", "cld3-py"),
            note="theirs finds no more than the language",
        ),
    ]


def captions(count: int) -> pa.Table:
    """Seeded; the corpus's captions in scenes (70 %), with ends (18 %), lost ones (12 %)."""
    rng = random.Random(0)
    corpus = pq.read_table(CORPUS, columns=["caption"])["caption"].to_pylist()

    def caption() -> str:
        kind = rng.random()
        if kind < 0.12:
            return rng.choice(LOST)
        text = f"{rng.choice(corpus)} {rng.choice(SCENES)}"
        return text + rng.choice(ENDS) if kind < 0.3 else text

    width = [1200 if rng.random() < 0.03 else 512 for _ in range(count)]
    return pa.table(
        {
            "caption": [caption() for _ in range(count)],
            "original_width": pa.array(width, pa.int32()),
            "original_height": pa.array([512] * count, pa.int32()),
        }
    )
