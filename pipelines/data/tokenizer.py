"""Captions as ids: byte-level BPE of lower-cased text, with BPE dropout that a seed reproduces.

The paper fixes 16,384 ids, at most 256 a caption, lower case and 10 % BPE dropout in training; the
special ids, whitespace and where words end are ours. Every byte has an id: there is no unknown.
"""

import hashlib
import heapq
import itertools
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

PAD_ID = 0
START_ID = 1
SPECIALS = ("<pad>", "<start>")
BYTES = 256
LARGEST_VOCAB = 1 << 16  # ids are stored as uint16
# What a tokenizer.json must share with ours, to mean the same by the same text.
PARTS = ("normalizer", "pre_tokenizer", "decoder", "post_processor", "truncation", "padding")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How the tokenizer is trained. The default is the paper's vocabulary."""

    vocab_size: int = 16_384
    """Most ids there may be: 2 special ones, 256 bytes, then merges. Few captions make fewer."""
    min_frequency: int = 2
    """How often a pair must occur to be merged. The paper does not say; 1 learns misspellings."""

    def __post_init__(self) -> None:
        least = len(SPECIALS) + BYTES
        if not least <= self.vocab_size <= LARGEST_VOCAB:
            raise ValueError(
                f"vocab_size must be from {least} (no merges) to {LARGEST_VOCAB} (uint16), "
                f"got {self.vocab_size}"
            )
        if self.min_frequency < 1:
            raise ValueError(f"min_frequency must be at least 1, got {self.min_frequency}")


def train_tokenizer(captions: Iterable[str], config: TokenizerConfig) -> bytes:
    """The bytes of a tokenizer.json; the same for the same captions in any order."""
    tokenizer = _empty_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer.to_str(pretty=True).encode()


class CaptionTokenizer:
    """Turns captions into ids of a fixed length, and ids back into text."""

    def __init__(self, data: bytes, name: str) -> None:
        """Read the bytes of a tokenizer.json; `name` is how errors call it."""
        self.digest = hashlib.sha256(data).hexdigest()
        self._tokenizer = _checked_tokenizer(data, name)
        # A caption that spells "<pad>" is text like any other.
        self._tokenizer.encode_special_tokens = True
        self._ids = self._tokenizer.get_vocab()
        self._pairs = {
            (self._ids[left], self._ids[right]): (rank, self._ids[left + right])
            for rank, (left, right) in enumerate(_merges(data))
        }

    @classmethod
    def from_file(cls, path: Path) -> "CaptionTokenizer":
        """Raises FileNotFoundError, or ValueError if it is not a tokenizer that we trained."""
        if not path.is_file():
            raise FileNotFoundError(f"{path} must be a tokenizer: run jobs.train_tokenizer first")
        return cls(path.read_bytes(), str(path))

    @property
    def vocab_size(self) -> int:
        return len(self._ids)

    def normalize(self, caption: str) -> str:
        """The text that the ids stand for: lower case, NFC, single spaces."""
        return self._tokenizer.normalizer.normalize_str(_unicode(caption))

    def encode(
        self, caption: str, length: int, *, dropout: float = 0.0, rng: random.Random | None = None
    ) -> np.ndarray:
        """START, the caption's ids, PAD…: uint16 [length]; what does not fit is cut off.

        `dropout` is the chance that a merge is passed over (BPE dropout, Provilkov et al. 2020;
        0.1 in the paper, in training only). Every chance is drawn from `rng`: the library's own
        dropout cannot be seeded, and a run that resumes must see the ids it would have seen.
        """
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout must be from 0 to 1, got {dropout}")
        if dropout == 0.0:
            ids = self._tokenizer.encode(_unicode(caption)).ids
        elif rng is None:
            raise ValueError("dropout must come with an rng, got none")
        else:
            ids = self._encode_with_dropout(caption, length - 1, dropout, rng)
        row = np.full(length, PAD_ID, dtype=np.uint16)
        row[0] = START_ID
        kept = ids[: length - 1]
        row[1 : 1 + len(kept)] = kept
        return row

    def count(self, caption: str) -> int:
        """How many ids the whole caption has without START, before anything is cut off."""
        return len(self._tokenizer.encode(_unicode(caption)).ids)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; special ids are left out, bytes that are no UTF-8 become U+FFFD."""
        plain = [int(index) for index in ids]
        if wrong := [index for index in plain if not 0 <= index < self.vocab_size]:
            raise ValueError(f"ids must be from 0 to {self.vocab_size - 1}, got {wrong[0]}")
        text = self._tokenizer.decode(plain, skip_special_tokens=True)
        return str(text).removeprefix(" ")

    def _encode_with_dropout(
        self, caption: str, limit: int, dropout: float, rng: random.Random
    ) -> list[int]:
        ids: list[int] = []
        for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(self.normalize(caption)):
            if len(ids) >= limit:
                break
            ids += merge([self._ids[byte] for byte in word], self._pairs, dropout, rng)
        return ids


def merge(
    ids: list[int],
    pairs: dict[tuple[int, int], tuple[int, int]],
    dropout: float,
    rng: random.Random,
) -> list[int]:
    """Merge one word's ids, best rank first; before each merge every better one may be passed over.

    `pairs` maps two ids to (rank, merged id). A pair that was passed over has a new chance after
    the next merge, as in the library. Takes O(n log n) steps for n ids at a constant dropout.
    """
    following = [*range(1, len(ids)), -1]
    previous = [*range(-1, len(ids) - 1)]
    ids = list(ids)  # -1 marks an id that was merged into the one before it
    queue = [
        (*pairs[pair], place) for place, pair in enumerate(itertools.pairwise(ids)) if pair in pairs
    ]
    heapq.heapify(queue)
    passed_over: list[tuple[int, int, int]] = []
    while queue:
        entry = heapq.heappop(queue)
        _, merged, place = entry
        right = following[place]
        # An entry whose pair has changed meanwhile is stale.
        if ids[place] < 0 or right < 0 or pairs.get((ids[place], ids[right])) != entry[:2]:
            continue
        if rng.random() < dropout:
            passed_over.append(entry)
            continue
        ids[place], ids[right] = merged, -1
        following[place] = following[right]
        if following[place] >= 0:
            previous[following[place]] = place
        for left in (previous[place], place):
            pair = (ids[left], ids[following[left]]) if left >= 0 and following[left] >= 0 else None
            if pair in pairs:
                heapq.heappush(queue, (*pairs[pair], left))
        for entry in passed_over:
            heapq.heappush(queue, entry)
        passed_over = []
    return [index for index in ids if index >= 0]


def length_statistics(
    tokenizer: CaptionTokenizer, captions: Iterable[str], text_len: int
) -> dict[str, float]:
    """How many ids captions have, START counted; `cut_share` of them have more than `text_len`."""
    lengths = np.array([1 + tokenizer.count(caption) for caption in captions])
    if not len(lengths):
        return {"captions": 0}
    return {
        "captions": len(lengths),
        "tokens_mean": round(float(lengths.mean()), 3),
        "tokens_p99": float(np.percentile(lengths, 99)),
        "tokens_max": int(lengths.max()),
        "cut_share": float((lengths > text_len).mean()),
    }


def _empty_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    # Lower case before NFC: lower-casing can leave letters apart that NFC joins.
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    # The space before the first word makes it the same word as in the middle of a caption.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _checked_tokenizer(data: bytes, name: str) -> Tokenizer:
    """Parse a tokenizer.json; refuse one that is broken or not from `train_tokenizer`."""
    try:
        tokenizer = Tokenizer.from_buffer(data)
        content = json.loads(data)
    except Exception as error:  # the library raises plain Exception for whatever it cannot parse
        raise ValueError(f"{name} must be a tokenizer.json, but it is broken: {error}") from error
    ours = json.loads(_empty_tokenizer().to_str())
    for part in PARTS:
        if content.get(part) != ours[part]:
            raise ValueError(
                f"{name} must be made by jobs.train_tokenizer, got one with another {part}: "
                f"{json.dumps(content.get(part))[:200]}"
            )
    model = content["model"]
    vocab, options = model["vocab"], model.keys() - {"vocab", "merges"}
    if other := sorted(key for key in options if model[key] != ours["model"].get(key)):
        raise ValueError(f"{name} must be a plain BPE, got {other[0]} {model[other[0]]!r}")
    if sorted(vocab.values()) != list(range(len(vocab))) or len(vocab) > LARGEST_VOCAB:
        raise ValueError(f"{name} must number its {len(vocab)} ids from 0 without a gap, in uint16")
    if tuple(sorted(vocab, key=vocab.__getitem__)[: len(SPECIALS)]) != SPECIALS:
        raise ValueError(f"{name} must have the ids 0 {SPECIALS[0]} and 1 {SPECIALS[1]}")
    if missing := set(pre_tokenizers.ByteLevel.alphabet()) - set(vocab):
        raise ValueError(f"{name} must have an id for every byte, but {len(missing)} are missing")
    if {token["content"] for token in content["added_tokens"]} != set(SPECIALS):
        raise ValueError(f"{name} must have no added tokens but {' and '.join(SPECIALS)}")
    return tokenizer


def _merges(data: bytes) -> list[tuple[str, str]]:
    return [(left, right) for left, right in json.loads(data)["model"]["merges"]]


def _unicode(caption: str) -> str:
    """The caption, if it is text; half a surrogate pair (JSON allows it) is not."""
    if not isinstance(caption, str):
        raise ValueError(f"caption must be a string, got {type(caption).__name__}")
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"caption must be valid Unicode, got {caption[:80]!r}") from error
    return caption
