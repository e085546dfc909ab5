"""The caption tokenizer against the library it is trained with, and against its own rules."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pipelines.data.tokenizer import (
    PAD_ID,
    START_ID,
    CaptionTokenizer,
    TokenizerConfig,
    train_tokenizer,
)

COLOURS = ["red", "blue", "Green", "yellow", "grey", "white"]
THINGS = ["apple", "Bicycle", "grinning face", "lighthouse", "café table", "paper aeroplane"]
PLACES = ["on a table", "in the grass", "under the Sea", "beside 2 dogs", "at night"]
CAPTIONS = [f"a {c} {t} {p}" for c in COLOURS for t in THINGS for p in PLACES]
CONFIG = TokenizerConfig(vocab_size=400)
DATA = train_tokenizer(CAPTIONS, CONFIG)
TOKENIZER = CaptionTokenizer(DATA, "test")
# Any text, and text that looks like a caption (so that there is something to merge).
TEXTS = st.one_of(
    st.text(alphabet=st.characters(codec="utf-8"), max_size=60),
    st.lists(st.sampled_from([*COLOURS, *THINGS, *PLACES, "<pad>", "\t", "é"]), max_size=12).map(
        " ".join
    ),
)


def ids_of(caption: str, dropout: float = 0.0, seed: int = 0) -> list[int]:
    """Ids without START and PAD; long enough for every text of this file."""
    row = TOKENIZER.encode(caption, 2000, dropout=dropout, rng=random.Random(seed))
    assert row[0] == START_ID
    return [index for index in row.tolist()[1:] if index != PAD_ID]


def test_the_defaults_are_the_papers_vocabulary() -> None:
    assert TokenizerConfig().vocab_size == 16_384


def test_a_row_is_start_then_the_caption_then_padding_in_uint16() -> None:
    row = TOKENIZER.encode("a red apple", 32)
    count = TOKENIZER.count("a red apple")
    assert row.dtype == np.uint16
    assert row.shape == (32,)
    assert row[0] == START_ID
    assert (row[1 : 1 + count] > START_ID).all()
    assert (row[1 + count :] == PAD_ID).all()


def test_what_does_not_fit_is_cut_off() -> None:
    whole = TOKENIZER.encode("a red apple on a table", 64)
    assert TOKENIZER.count("a red apple on a table") > 3
    np.testing.assert_array_equal(TOKENIZER.encode("a red apple on a table", 4), whole[:4])
    assert TOKENIZER.encode("a red apple", 1).tolist() == [START_ID]


@given(TEXTS)
@example("<pad><start>")
@example("İstanbul ǅ ẞ")
@example("a" * 300)
def test_merging_ourselves_gives_the_librarys_ids(caption: str) -> None:
    # The smallest dropout there is drops nothing, and takes our way instead of the library's.
    assert ids_of(caption, dropout=5e-324) == ids_of(caption)


@given(TEXTS, st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_decoding_gives_the_normalised_caption_back(caption: str, dropout: float) -> None:
    assert TOKENIZER.decode(ids_of(caption, dropout)) == TOKENIZER.normalize(caption)


@given(TEXTS)
def test_a_caption_never_makes_a_special_id(caption: str) -> None:
    row = TOKENIZER.encode(caption, 2000)
    count = TOKENIZER.count(caption)
    assert START_ID not in row[1:]
    assert PAD_ID not in row[1 : 1 + count]


@given(TEXTS, st.integers(0, 2**32))
def test_the_same_seed_gives_the_same_ids(caption: str, seed: int) -> None:
    assert ids_of(caption, 0.3, seed) == ids_of(caption, 0.3, seed)


@given(TEXTS)
def test_dropping_every_merge_leaves_bytes(caption: str) -> None:
    text = TOKENIZER.normalize(caption)
    # The space that stands before the first word is one byte more; an empty caption has no word.
    assert len(ids_of(caption, 1.0)) == (len(text.encode()) + 1 if text else 0)


def test_more_dropout_makes_longer_captions() -> None:
    means = [
        np.mean([len(ids_of(caption, dropout, seed)) for seed, caption in enumerate(CAPTIONS)])
        for dropout in (0.0, 0.1, 0.5, 1.0)
    ]
    assert means == sorted(means)
    assert means[0] < means[1] * 0.97  # a tenth of the merges is felt, and is no more than a tenth
    assert means[1] < means[0] * 1.5


def test_dropout_chooses_segmentations_as_the_library_does() -> None:
    """The same frequencies as the library's own dropout, which cannot be seeded."""
    content = json.loads(DATA)
    content["model"]["dropout"] = 0.5
    library = Tokenizer.from_str(json.dumps(content))
    draws = 4000
    rng = random.Random(7)
    ours, theirs = (
        [tuple(TOKENIZER.encode("red", 8, dropout=0.5, rng=rng)[1:]) for _ in range(draws)],
        [(*library.encode("red").ids, *[PAD_ID] * 7)[:7] for _ in range(draws)],
    )
    for segmentation in set(ours) | set(theirs):
        difference = ours.count(segmentation) - theirs.count(segmentation)
        # Five standard deviations of the difference of two counts of 4,000 draws.
        assert abs(difference) < 5 * (2 * draws * 0.25) ** 0.5
    assert set(ours) == set(theirs)


@pytest.mark.parametrize("threads", ["1", "4"])
def test_training_gives_the_same_bytes_in_any_order_process_and_number_of_threads(
    threads: str, tmp_path: Path
) -> None:
    shuffled = list(CAPTIONS)
    random.Random(3).shuffle(shuffled)
    (tmp_path / "captions.json").write_text(json.dumps(shuffled))
    script = (
        "import json, sys; from pipelines.data.tokenizer import *\n"
        "captions = json.load(open(sys.argv[1]))\n"
        "sys.stdout.buffer.write(train_tokenizer(captions, TokenizerConfig(vocab_size=400)))"
    )
    made = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "captions.json")],
        capture_output=True,
        check=True,
        env=os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
    ).stdout
    assert made == DATA


def test_ties_between_pairs_are_broken_alike_in_any_order() -> None:
    words = ["ab cd", "cd ef", "ef ab", "gh ij", "ij gh"] * 4  # every pair as often as the others
    assert train_tokenizer(words, CONFIG) == train_tokenizer(words[::-1], CONFIG)


def test_the_vocabulary_is_never_larger_than_asked_for() -> None:
    assert TOKENIZER.vocab_size <= 400
    assert CaptionTokenizer(train_tokenizer([], CONFIG), "none").vocab_size == 258


def test_the_digest_is_of_the_files_bytes(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(DATA)
    assert CaptionTokenizer.from_file(path).digest == TOKENIZER.digest
    path.write_bytes(DATA + b"\n")
    assert CaptionTokenizer.from_file(path).digest != TOKENIZER.digest


def changed(**parts: object) -> bytes:
    return json.dumps(json.loads(DATA) | parts).encode()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "broken"),
        (DATA[:-20], "broken"),
        (b"\x00\xff", "broken"),
        (b"{}", "broken"),
        (changed(normalizer=None), "another normalizer"),
        (changed(pre_tokenizer={"type": "Whitespace"}), "another pre_tokenizer"),
        (changed(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}), "BPE"),
        (changed(added_tokens=[]), "added tokens"),
        (changed(model=json.loads(DATA)["model"] | {"dropout": 0.5}), "dropout"),
        (changed(model={"type": "BPE", "vocab": {"a": 0}, "merges": []}), "<pad>"),
    ],
)
def test_a_foreign_or_broken_file_is_refused_with_its_name(
    data: bytes, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"tokenizer\.json") as error:
        CaptionTokenizer.from_file(path)
    assert words in str(error.value)


def test_a_missing_file_says_which_job_makes_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"jobs\.train_tokenizer"):
        CaptionTokenizer.from_file(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("caption", [None, 3, b"red", "half \ud800 a pair"])
def test_what_is_no_text_is_refused(caption: object) -> None:
    with pytest.raises(ValueError, match="caption must be"):
        TOKENIZER.encode(caption, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize("ids", [[-1], [400_000]])
def test_ids_that_are_none_are_refused(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="ids must be from 0 to"):
        TOKENIZER.decode(ids)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        TOKENIZER.encode("red", 0)
    with pytest.raises(ValueError, match="dropout must be from 0 to 1, got 2"):
        TOKENIZER.encode("red", 8, dropout=2.0, rng=random.Random(0))
    with pytest.raises(ValueError, match="dropout must come with an rng"):
        TOKENIZER.encode("red", 8, dropout=0.1)
    with pytest.raises(ValueError, match="vocab_size must be from 258"):
        TokenizerConfig(vocab_size=100)
    with pytest.raises(ValueError, match="vocab_size must be from 258"):
        TokenizerConfig(vocab_size=70_000)
    with pytest.raises(ValueError, match="min_frequency must be at least 1"):
        TokenizerConfig(min_frequency=0)
