"""The paper's filters that look at one row: rules with a name, cheapest first.

The paper names its filters (a subset of Sharma et al. 2018: captions too short, not English by
cld3, mostly boilerplate such as "photographed on <date>", aspect ratio outside [1/2, 2]) but not
their thresholds; those here are ours. No rule decodes a picture.

A rule sees a whole shard's rows at once, and only those that no earlier rule dropped. All but the
language detector are Arrow's kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data import boilerplate

CLD3_MAX_BYTES = 1000
COLUMNS = ["caption", "original_width", "original_height"]
MOST_LETTERS = 1000  # RE2's limit for a repetition
WORD = rf"\pL{boilerplate.SPACES.replace('[', '[^', 1)}*"
"""From a word's first letter to its end: as many matches as words that have a letter."""
# Latin, its accents and phonetic letters end at U+02AF; Vietnamese and others sit at U+1E00.
LATIN = r"[A-Za-z\x{aa}\x{b5}\x{ba}\x{c0}-\x{d6}\x{d8}-\x{f6}\x{f8}-\x{2af}\x{1e00}-\x{1eff}]"


@dataclass(frozen=True, kw_only=True)
class RowRulesConfig:
    """Thresholds. Only the aspect ratio and the language detector are the paper's."""

    min_letters: int = 5
    """Letters that a caption must have."""
    min_words: int = 3
    """Words that a caption must have, and that must be left of it without its boilerplate."""
    english_probability: float = 0.9
    """A caption is dropped as not English only if cld3 is reliable and at least this certain."""
    english_min_letters: int = 20
    """... and if the caption has this many letters: cld3 takes "a kimono" for Macedonian."""
    max_aspect_ratio: float = 2.0
    """Longer side / shorter side of the original; the paper keeps [1/2, 2], ends included."""
    min_side: int = 256
    """Pixels of the original's shorter side: below the model's 256 there is only blur to learn."""

    def __post_init__(self) -> None:
        if not 0 <= self.english_probability <= 1:
            raise ValueError(
                f"english_probability must be in [0, 1], got {self.english_probability}"
            )
        if self.max_aspect_ratio < 1:
            raise ValueError(f"max_aspect_ratio must be at least 1, got {self.max_aspect_ratio}")
        if not all(0 <= n <= MOST_LETTERS for n in (self.min_letters, self.english_min_letters)):
            raise ValueError(
                f"min_letters and english_min_letters must be in [0, {MOST_LETTERS}], "
                f"got {self.min_letters}, {self.english_min_letters}"
            )


@dataclass(frozen=True)
class Rule:
    """One reason to drop a row."""

    reason: str
    """Its name, and the code in the `reason` column of dropped rows."""
    about: str
    """What it drops, in a line."""
    find: Callable[[pa.Table, RowRulesConfig], pa.Array]
    """From rows (`COLUMNS`) to strings: details of the rows that it drops, null for the others."""


def judge(rows: pa.Table, config: RowRulesConfig) -> tuple[pa.Array, pa.Array]:
    """Reason and detail of each row, null for rows that stay; `rows` has `COLUMNS`."""
    reasons = np.full(len(rows), None, object)
    details = np.full(len(rows), None, object)
    left = np.arange(len(rows))
    rows = rows.select(COLUMNS).combine_chunks()
    for rule in ROW_RULES:
        found = rule.find(rows, config)
        dropped = found.is_valid().to_numpy(zero_copy_only=False)
        reasons[left[dropped]] = rule.reason
        details[left[dropped]] = found.drop_null().to_pylist()
        if dropped.any():
            left, rows = left[~dropped], rows.filter(pa.array(~dropped)).combine_chunks()
    return pa.array(reasons, pa.string()), pa.array(details, pa.string())


def _aspect_ratio(rows: pa.Table, config: RowRulesConfig) -> pa.Array:
    width, height = _sides(rows)
    short, long = np.minimum(width, height), np.maximum(width, height)
    return _sizes(rows, long > config.max_aspect_ratio * short)


def _small_picture(rows: pa.Table, config: RowRulesConfig) -> pa.Array:
    return _sizes(rows, np.minimum(*_sides(rows)) < config.min_side)


def _foreign_script(rows: pa.Table, config: RowRulesConfig) -> pa.Array:
    """Text that is mostly not in the Latin script is not English.

    No detector is needed, and one that wants 20 letters would keep four words of Japanese.
    """
    captions = _captions(rows)
    alien = pc.invert(pc.string_is_ascii(captions))
    texts = captions.filter(alien)
    letters, latin = (_count(texts, pattern) for pattern in (r"\pL", LATIN))
    alien = pc.replace_with_mask(alien, alien, pa.array(2 * latin < letters))
    return _where(alien.to_numpy(zero_copy_only=False), "script")


def _short_caption(rows: pa.Table, config: RowRulesConfig) -> pa.Array:
    captions = _captions(rows)
    words = _count(captions, WORD)
    short = ~_has_letters(captions, config.min_letters) | (words < config.min_words)
    letters = _count(captions.filter(pa.array(short)), r"\pL").tolist()
    pairs = zip(words[short].tolist(), letters, strict=True)
    return _place(short, [f"{count} words, {size} letters" for count, size in pairs])


def _boilerplate(rows: pa.Table, config: RowRulesConfig) -> pa.Array:
    captions = _captions(rows)
    rest = boilerplate.strip(captions)
    suspects = rest.is_valid()
    # A caption of three words may lose none, one of five may lose two.
    enough = np.minimum(_count(captions.filter(suspects), WORD), config.min_words)
    lost = pa.array(_count(rest.drop_null(), WORD) < enough)
    dropped = pc.replace_with_mask(suspects, suspects, lost)
    return _where(dropped.to_numpy(zero_copy_only=False), "")


def _foreign_language(rows: pa.Table, config: RowRulesConfig) -> pa.Array:
    captions = _captions(rows)
    long = _has_letters(captions, config.english_min_letters)
    languages = [
        _foreign(caption, config.english_probability)
        for caption in captions.filter(pa.array(long)).to_pylist()
    ]
    return _place(long, languages)


ROW_RULES = (
    Rule("aspect_ratio", "sides outside [1/2, 2]", _aspect_ratio),
    Rule("small_picture", "shorter side below the least", _small_picture),
    Rule("not_english", "mostly not in the Latin script", _foreign_script),
    Rule("short_caption", "too few words or letters", _short_caption),
    Rule("boilerplate", "too few words beside dates, file names and credits", _boilerplate),
    Rule("not_english", "another language, says cld3 reliably", _foreign_language),
)


def _captions(rows: pa.Table) -> pa.Array:
    return _whole(rows["caption"])


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [_NONE])


_NONE = pa.array([], pa.string())


def _sides(rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    return rows["original_width"].to_numpy(), rows["original_height"].to_numpy()


def _sizes(rows: pa.Table, dropped: np.ndarray) -> pa.Array:
    sides = zip(*(side[dropped].tolist() for side in _sides(rows)), strict=True)
    return _place(dropped, [f"{width} x {height}" for width, height in sides])


def _where(dropped: np.ndarray, detail: str) -> pa.Array:
    return _place(dropped, [detail] * int(dropped.sum()))


def _place(mask: np.ndarray, values: list[Any]) -> pa.Array:
    """The values where the mask is true, null elsewhere."""
    nulls = pa.nulls(len(mask), pa.string())
    return pc.replace_with_mask(nulls, pa.array(mask), pa.array(values, pa.string()))


def _count(captions: pa.Array, pattern: str) -> np.ndarray:
    counts: np.ndarray = pc.count_substring_regex(captions, pattern).to_numpy(zero_copy_only=False)
    return counts


def _has_letters(captions: pa.Array, least: int) -> np.ndarray:
    # From the start on: a search that may begin at any letter is fifteen times as slow.
    found = pc.match_substring_regex(captions, rf"\A\PL*(?:\pL\PL*){{{least}}}")
    return np.asarray(found.to_numpy(zero_copy_only=False))


def _foreign(caption: str, least: float) -> str | None:
    """The language if cld3 is certain that it is not English."""
    found = detector().FindLanguage(caption)
    certain = found.is_reliable and found.probability >= least
    return found.language if certain and found.language != "en" else None


@lru_cache(maxsize=1)
def detector() -> Any:
    """This process's cld3."""
    import gcld3

    return gcld3.NNetLanguageIdentifier(min_num_bytes=0, max_num_bytes=CLD3_MAX_BYTES)
