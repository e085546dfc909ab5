"""The rules that look at one row, one edge at a time, and against the same rules row by row."""

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data import boilerplate
from pipelines.data.row_rules import ROW_RULES, RowRulesConfig, judge
from tests.fixtures import row_by_row
from tests.fixtures.datasets import CORPUS

CONFIG = RowRulesConfig()


def pairs(captions: list[str], width: int = 512, height: int = 512) -> pa.Table:
    sides = {"original_width": width, "original_height": height}
    columns = {name: pa.array([side] * len(captions), pa.int32()) for name, side in sides.items()}
    return pa.table({"caption": pa.array(captions, pa.string()), **columns})


def reasons_of(captions: list[str]) -> dict[str, str]:
    reasons = judge(pairs(captions), CONFIG)[0].to_pylist()
    return {caption: reason or "" for caption, reason in zip(captions, reasons, strict=True)}


def without_boilerplate(captions: list[str]) -> list[str]:
    rests: list[str] = boilerplate.strip(pa.array(captions)).to_pylist()
    return rests


DATES = [
    "12 May 2009",
    "12th May 2009",
    "12th of May, 2009",
    "12. May 2009",
    "12-May-2009",
    "12-May-09",
    "12 may '09",
    "May 12, 2009",
    "May 12th, 2009",
    "May 12th 2009",
    "May. 12, 2009",
    "may 2009",
    "2009 May 12",
    "2009-05-12",
    "2009/05/12",
    "2009.05.12",
    "2009:05:12 10:22:33",
    "2009-05-12T10:22:33Z",
    "2009-05-12 at 10.22 pm",
    "20090512",
    "12/05/2009",
    "5/12/09",
    "12.05.2009",
    "12-05-2009",
    "Saturday, 12 May 2009",
    "Sat 12 May 2009",
    "Tuesday the 12th of September 2009",
    "the 1st of January 1900",
    "3rd Sept. 2010",
    "22nd October 2011 at 10:15 am",
    "12 May 2009, 10:15",
    "summer 2009",
    "the late summer of 1999",
    "2009",
    "c. 1920",
    "the 1920s",
    "31 December",
]


@pytest.mark.parametrize(
    "phrase",
    [
        "photographed on {}",
        "Photo taken on {}.",
        "this picture was taken {}",
        "Image uploaded on {}",
        "Date of photo: {}",
    ],
)
def test_a_caption_that_is_only_a_date_is_boilerplate(phrase: str) -> None:
    captions = [phrase.format(date) for date in DATES]
    assert set(reasons_of(captions).values()) <= {"boilerplate", "short_caption"}
    for caption, rest in zip(captions, without_boilerplate(captions), strict=True):
        assert not any(map(str.isalnum, rest)), caption


def test_a_caption_that_says_something_beside_its_date_stays() -> None:
    captions = [f"a red kite above the harbour, photographed on {date}" for date in DATES]
    assert reasons_of(captions) == dict.fromkeys(captions, "")


def test_what_pages_say_around_a_picture_is_boilerplate() -> None:
    captions = [
        "IMG_20190512_101533.jpg IMG_1234.JPG DSC00012.JPG",
        "click here to enlarge this picture",
        "Click on the image to see a larger version",
        "Photo by John Smith of London",
        "© 2010 John Smith. All rights reserved.",
        "Image courtesy of the Smith Museum",
        "no caption available yet",
        "Image 3 of 12 stock photo",
        "Untitled photo uploaded by John Smith",
    ]
    assert reasons_of(captions) == dict.fromkeys(captions, "boilerplate")


def test_words_that_look_like_boilerplate_stay() -> None:
    captions = [
        "a march of soldiers in may",
        "two people taken by surprise",
        "a shot glass beside the sea",
        "the image of a saint on a wall",
        "an old clock showing 10:15",
        "a photo of a cat on a chair",
        "an augustus statue in the park",
        "room 101 of the grand hotel",
        "a picture of a 3rd place medal",
        "the credit card on the table is blue",
        "a file of ants crossing a path",
    ]
    assert reasons_of(captions) == dict.fromkeys(captions, "")


def test_short_and_foreign_captions_are_dropped() -> None:
    expected = [
        ("", "short_caption"),
        ("dog", "short_caption"),
        ("a dog", "short_caption"),
        ("a b c", "short_caption"),
        ("a big dog", ""),
        ("12 34 56 78", "short_caption"),
        ("… — !!! ???", "short_caption"),
        ("👍 👍 👍 👍", "short_caption"),
        ("ein roter Apfel auf einem Tisch", "not_english"),
        ("un chat noir qui dort sur le canapé", "not_english"),
        ("gato negro durmiendo en el sofá", "not_english"),
        ("czerwone jabłko leży na stole", "not_english"),
        ("bu masanın üstünde kırmızı bir elma var", "not_english"),
        ("красное яблоко на столе", "not_english"),
        ("яблоко", "not_english"),
        ("赤いりんご", "not_english"),
        ("红苹果在桌子上", "not_english"),
        ("빨간 사과", "not_english"),
        ("تفاحة حمراء على الطاولة", "not_english"),
        ("תפוח אדום", "not_english"),
        ("a red apple lies on a wooden table", ""),
        ("a small café in the old town of Zürich with a piñata on the wall", ""),
        ("the word 愛 on a red lantern", ""),
        ("une pomme rouge", ""),  # too short for cld3 to be believed
        ("a kimono, clothing", ""),  # certainly Macedonian, says cld3
    ]
    assert reasons_of([caption for caption, _ in expected]) == dict(expected)


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [
        (512, 256, ""),
        (256, 512, ""),
        (513, 256, "aspect_ratio"),
        (256, 513, "aspect_ratio"),
        (256, 256, ""),
        (255, 255, "small_picture"),
        (400, 255, "small_picture"),
        (5000, 100, "aspect_ratio"),
    ],
)
def test_the_ends_of_the_aspect_range_are_included(width: int, height: int, reason: str) -> None:
    reasons, details = judge(pairs(["a red kite on a beach"], width, height), CONFIG)
    assert (reasons[0].as_py() or "") == reason
    assert details[0].as_py() == (f"{width} x {height}" if reason else None)


def test_the_shipped_corpus_passes_the_caption_filters() -> None:
    captions = pq.read_table(CORPUS, columns=["caption"])["caption"].to_pylist()
    lost = judge(pairs(captions), CONFIG)[0].drop_null()
    assert len(lost) < 0.02 * len(captions), lost


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"english_probability must be in \[0, 1\], got 2"):
        RowRulesConfig(english_probability=2)
    with pytest.raises(ValueError, match=r"max_aspect_ratio must be at least 1, got 0.5"):
        RowRulesConfig(max_aspect_ratio=0.5)
    with pytest.raises(ValueError, match=r"must be in \[0, 1000\], got 5, 1001"):
        RowRulesConfig(english_min_letters=1001)


FOREIGN_DATES = [
    "aufgenommen am 12. Mai 2009",
    "fotografiert am 3. März 2010",
    "prise le 14 juillet 2004",
    "photographiée le 2 février 2015",
    "tomada el 12 de mayo de 2009",
    "scattata il 3 dicembre 2011",
    "tirada em 7 de setembro de 2012",
    "genomen op 3 maart 2008",
]


def test_dates_in_other_languages_are_boilerplate_too() -> None:
    for caption, rest in zip(FOREIGN_DATES, without_boilerplate(FOREIGN_DATES), strict=True):
        assert not any(map(str.isalnum, rest)), caption


PIECES = [
    *("a red kite", "above the harbour", "two dogs", "ein roter Apfel auf dem Tisch", "photo by"),
    *("赤いりんご", "красное яблоко", "café", "naïve", "piñata", "Ελλάδα", "12", "x", "…", "“so”"),
    *("stock photo", "click here to enlarge", "IMG_1234.JPG", "año.jpg", "© 2010 Ana", "3/12"),
    *("no caption available", "shot with my iPhone 4", "via flickr", "credit: Jo; a boat", "👍"),
    *DATES,
    *FOREIGN_DATES,
]
SPACES = [" ", " ", " ", ", ", "\t", "\n", "\u00a0", "\u3000", "\x0b", "\x1f", "; ", "-", ""]


def random_captions(count: int) -> list[str]:
    rng = random.Random(0)
    return [
        "".join(rng.choice(PIECES) + rng.choice(SPACES) for _ in range(rng.randrange(6)))
        for _ in range(count)
    ]


def test_whole_shards_are_judged_as_rows_are_one_by_one() -> None:
    captions = random_captions(1500)
    rng = random.Random(1)
    sides = [(rng.choice((250, 256, 300, 700)), rng.choice((256, 300, 600))) for _ in captions]
    width, height = (pa.array(side, pa.int32()) for side in zip(*sides, strict=True))
    table = pa.table({"caption": captions, "original_width": width, "original_height": height})
    expected = [row_by_row.drop_reason(row, CONFIG) for row in table.to_pylist()]
    found = [column.to_pylist() for column in judge(table, CONFIG)]
    assert list(zip(*found, strict=True)) == [reason or (None, None) for reason in expected]
    assert {reason[0] for reason in expected if reason} == {rule.reason for rule in ROW_RULES}


def test_boilerplate_is_found_as_it_is_one_by_one() -> None:
    captions = random_captions(1500)
    found = boilerplate.strip(pa.array(captions)).to_pylist()
    for caption, rest in zip(captions, found, strict=True):
        expected = row_by_row.strip(caption)
        assert rest == expected if rest is not None else expected.split() == caption.split()


def test_a_shard_of_no_rows_has_no_reasons() -> None:
    assert [len(column) for column in judge(pairs([]), CONFIG)] == [0, 0]
