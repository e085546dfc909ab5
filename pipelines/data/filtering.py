"""The paper's filters: which downloaded pairs are worth learning from.

The paper names its filters (a subset of Sharma et al. 2018: captions too short, not English by
cld3, mostly boilerplate such as "photographed on <date>", aspect ratio outside [1/2, 2]) but not
their thresholds; those here are ours. Exact duplicates of pictures are dropped as well.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data import boilerplate
from pipelines.data.schema import DROPPED, FILTERED
from pipelines.data.stage import DatasetWriter, Manifest
from pipelines.data.storage import Location

STAGE = "filter_pairs"
CLD3_MAX_BYTES = 1000
DUPLICATE_COLUMNS = ["key", "sha256", "caption", "original_width", "original_height"]


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
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


def filter_shard(
    table: pa.Table, config: FilterConfig, duplicates: Collection[str]
) -> tuple[pa.Table, pa.Table]:
    """Split a shard of RAW rows in FILTERED rows and DROPPED ones.

    `duplicates` are the keys of pictures that an earlier row of the dataset has already.
    """
    kept: list[bool] = []
    dropped: list[dict[str, str]] = []
    for row in table.drop_columns(["image"]).to_pylist():
        reason, detail = drop_reason(row, config) or ("", "")
        if not reason and row["key"] in duplicates:
            reason, detail = "duplicate_picture", row["sha256"][:12]
        kept.append(not reason)
        if reason:
            pair = {name: row[name] for name in ("key", "url", "caption")}
            dropped.append(pair | {"reason": reason, "detail": detail})
    return (
        table.filter(pa.array(kept, pa.bool_())).cast(FILTERED),
        pa.Table.from_pylist(dropped, schema=DROPPED),
    )


def drop_reason(row: Mapping[str, Any], config: FilterConfig) -> tuple[str, str] | None:
    """Why a pair is dropped, as (reason, detail); None if it stays."""
    short, long = sorted((row["original_width"], row["original_height"]))
    size = f"{row['original_width']} x {row['original_height']}"
    if long > config.max_aspect_ratio * short:
        return "aspect_ratio", size
    if short < config.min_side:
        return "small_picture", size
    return caption_reason(row["caption"], config)


def caption_reason(caption: str, config: FilterConfig) -> tuple[str, str] | None:
    """Why a caption is dropped, as (reason, detail); None if it stays."""
    letters = [letter for letter in caption if letter.isalpha()]
    # Any text that is mostly not in the Latin script is not English: no detector is needed, and one
    # that wants 20 letters would keep four words of Japanese.
    if sum(not _is_latin(letter) for letter in letters) * 2 > len(letters):
        return "not_english", "script"
    words = _words(caption)
    if len(letters) < config.min_letters or words < config.min_words:
        return "short_caption", f"{words} words, {len(letters)} letters"
    if _words(boilerplate.strip(caption)) < min(words, config.min_words):
        return "boilerplate", ""
    if len(letters) >= config.english_min_letters:
        found = _detector().FindLanguage(caption)
        certain = found.is_reliable and found.probability >= config.english_probability
        if certain and found.language != "en":
            return "not_english", found.language
    return None


def commit_filtered(
    item: dict[str, Any], *, raw: Path | Location, writer: DatasetWriter, config: FilterConfig
) -> dict[str, Any]:
    """Filter and commit one shard: `item` is its id and the keys of its duplicate pictures."""
    table = Manifest.load(raw).read(item["shard"])
    kept, dropped = filter_shard(table, config, set(item["duplicates"]))
    commit = writer.commit(item["shard"], kept, dropped, rows_in=table.num_rows, schema=FILTERED)
    return {"shard": commit.shard, "rows_in": commit.rows_in, "rows_out": commit.rows_out}


def duplicate_keys(
    shards: Sequence[str], read: Callable[[str, list[str]], pa.Table], config: FilterConfig
) -> dict[str, list[str]]:
    """Keys, by shard, of the pictures that an earlier row holds.

    Of equal pictures the first in order that no other rule drops stays. `read` gives a shard's
    columns. Takes about 100 bytes a picture at its peak, on the driver.
    """
    digests = [
        digest[:32] for shard in shards for digest in read(shard, ["sha256"])["sha256"].to_pylist()
    ]
    values, counts = np.unique(np.array(digests, dtype="S32"), return_counts=True)
    repeated = {value.decode() for value in values[counts > 1]}
    found: dict[str, list[str]] = {}
    taken: set[str] = set()
    for shard in shards if repeated else ():
        for row in read(shard, DUPLICATE_COLUMNS).to_pylist():
            digest = row["sha256"][:32]
            if digest not in repeated or drop_reason(row, config) is not None:
                continue
            if digest in taken:
                found.setdefault(shard, []).append(row["key"])
            taken.add(digest)
    return found


def _words(text: str) -> int:
    return sum(any(letter.isalpha() for letter in word) for word in text.split())


def _is_latin(letter: str) -> bool:
    # Latin, its accents and phonetic letters end at U+02AF; Vietnamese and others sit at U+1E00.
    return ord(letter) <= 0x02AF or 0x1E00 <= ord(letter) <= 0x1EFF


@lru_cache(maxsize=1)
def _detector() -> Any:
    import gcld3

    return gcld3.NNetLanguageIdentifier(min_num_bytes=0, max_num_bytes=CLD3_MAX_BYTES)
