"""The paper's filters, one edge at a time."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data import boilerplate
from pipelines.data.filtering import (
    FilterConfig,
    caption_reason,
    drop_reason,
    duplicate_keys,
    filter_shard,
)
from pipelines.data.schema import DROPPED, FILTERED
from tests.fixtures.datasets import CORPUS, filtered_row

CONFIG = FilterConfig()


def reason_of(caption: str) -> str:
    found = caption_reason(caption, CONFIG)
    return found[0] if found else ""


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


@pytest.mark.parametrize("date", DATES)
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
def test_a_caption_that_is_only_a_date_is_boilerplate(phrase: str, date: str) -> None:
    assert reason_of(phrase.format(date)) in ("boilerplate", "short_caption")
    assert not any(letter.isalnum() for letter in boilerplate.strip(phrase.format(date)))


@pytest.mark.parametrize("date", DATES)
def test_a_caption_that_says_something_beside_its_date_stays(date: str) -> None:
    assert reason_of(f"a red kite above the harbour, photographed on {date}") == ""


@pytest.mark.parametrize(
    "caption",
    [
        "IMG_20190512_101533.jpg IMG_1234.JPG DSC00012.JPG",
        "click here to enlarge this picture",
        "Click on the image to see a larger version",
        "Photo by John Smith of London",
        "© 2010 John Smith. All rights reserved.",
        "Image courtesy of the Smith Museum",
        "no caption available yet",
        "Image 3 of 12 stock photo",
        "Untitled photo uploaded by John Smith",
    ],
)
def test_what_pages_say_around_a_picture_is_boilerplate(caption: str) -> None:
    assert reason_of(caption) == "boilerplate"


@pytest.mark.parametrize(
    "caption",
    [
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
    ],
)
def test_words_that_look_like_boilerplate_stay(caption: str) -> None:
    assert reason_of(caption) == ""


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
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
    ],
)
def test_short_and_foreign_captions_are_dropped(caption: str, reason: str) -> None:
    assert reason_of(caption) == reason


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
    row = {"original_width": width, "original_height": height, "caption": "a red kite on a beach"}
    found = drop_reason(row, CONFIG)
    assert (found[0] if found else "") == reason


def test_no_row_is_lost_and_the_first_of_equal_pictures_stays() -> None:
    captions = ["a red kite", "the same kite again", "ein roter Drachen über dem Meer", "a big dog"]
    images = [b"kite", b"kite", b"other", b"dog"]
    rows = [filtered_row(caption, image) for caption, image in zip(captions, images, strict=True)]
    table = pa.Table.from_pylist(rows, schema=FILTERED)
    shards = {"00000": table.slice(0, 1), "00001": table.slice(1)}
    small = FilterConfig(min_side=64)
    duplicates = duplicate_keys(
        list(shards), lambda shard, names: shards[shard].select(names), small
    )
    assert duplicates == {"00001": [rows[1]["key"]]}
    kept, dropped = filter_shard(table, small, set(duplicates["00001"]))
    assert kept.schema == FILTERED
    assert dropped.schema == DROPPED
    assert kept["caption"].to_pylist() == ["a red kite", "a big dog"]
    assert dropped["reason"].to_pylist() == ["duplicate_picture", "not_english"]


def test_a_picture_stays_once_if_its_first_caption_is_dropped() -> None:
    captions = ["ein roter Drachen über dem Meer", "a red kite over the sea", "the same red kite"]
    rows = [filtered_row(caption, b"kite") for caption in captions]
    table = pa.Table.from_pylist(rows, schema=FILTERED)
    small = FilterConfig(min_side=64)
    duplicates = duplicate_keys(["00000"], lambda shard, names: table.select(names), small)
    assert duplicates == {"00000": [rows[2]["key"]]}


def test_an_empty_dataset_has_no_duplicates() -> None:
    empty = FILTERED.empty_table()
    assert duplicate_keys(["00000"], lambda shard, names: empty.select(names), CONFIG) == {}
    kept, dropped = filter_shard(FILTERED.empty_table(), CONFIG, set())
    assert (kept.num_rows, dropped.num_rows) == (0, 0)


def test_the_shipped_corpus_passes_the_caption_filters() -> None:
    captions = pq.read_table(CORPUS, columns=["caption"])["caption"].to_pylist()
    lost = [caption for caption in captions if reason_of(caption)]
    assert len(lost) < 0.02 * len(captions), lost


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"english_probability must be in \[0, 1\], got 2"):
        FilterConfig(english_probability=2)
    with pytest.raises(ValueError, match=r"max_aspect_ratio must be at least 1, got 0.5"):
        FilterConfig(max_aspect_ratio=0.5)
