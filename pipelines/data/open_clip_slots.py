"""The vocabulary of CLIP and of open_clip's models: byte-level BPE whose words end in </w>.

Their merges come as a text file, bpe_simple_vocab_16e6.txt.gz, in both packages; nothing of them is
needed here. Of their text cleaning by ftfy, curled quotation marks are made straight here; wrongly
decoded letters, ligatures and letters of full width are not repaired.
"""

import gzip
import hashlib
import html
import io
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

LARGEST_FILE = 16 << 20
"""Bytes of merges that are read at most; the released file has 3 MB."""
BYTES = 256
SPECIALS = ("<start_of_text>", "<end_of_text>")
# Contractions, words, single digits, runs of other signs (CLIP's simple_tokenizer.py).
PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

STRAIGHT = dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'") | dict.fromkeys(
    range(0x201C, 0x2020), '"'
)


class OpenClipSlots:
    """START, the caption, END, then 0; an END that a caption spells is text like any other."""

    def __init__(self, data: bytes, vocab_size: int, name: str) -> None:
        """Read the bytes of a merges file, packed or not; `name` is how errors call it."""
        self.vocab_size = vocab_size
        self.digest = hashlib.sha256(data).hexdigest()
        merges = _merges(data, vocab_size - 2 * BYTES - len(SPECIALS), name)
        letters = _byte_letters()
        words = [*letters, *(f"{letter}</w>" for letter in letters)]
        words += ["".join(merge) for merge in merges] + list(SPECIALS)
        if len(set(words)) != vocab_size:
            raise ValueError(f"{name} must name every merge once, but its ids are not {vocab_size}")
        self._tokenizer = _tokenizer({word: number for number, word in enumerate(words)}, merges)

    @classmethod
    def from_file(cls, path: Path, vocab_size: int) -> "OpenClipSlots":
        """Raises ValueError: there is no file, or it holds fewer merges than the model has ids."""
        if not path.is_file():
            raise ValueError(
                f"{path} must be the merges that the model was trained with "
                "(bpe_simple_vocab_16e6.txt.gz of CLIP or open_clip), but there is no such file"
            )
        return cls(path.read_bytes(), vocab_size, str(path))

    def slots(self, captions: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.zeros((len(captions), length), dtype=np.int64)
        ends = np.empty(len(captions), dtype=np.int64)
        for row, caption in enumerate(captions):
            kept = self._tokenizer.encode(_clean(caption)).ids[: length - 2]
            ends[row] = len(kept) + 1
            ids[row, : len(kept) + 2] = [self.vocab_size - 2, *kept, self.vocab_size - 1]
        return ids, ends


def _clean(caption: str) -> str:
    text = html.unescape(html.unescape(caption)).translate(STRAIGHT)
    return " ".join(unicodedata.normalize("NFC", text).split()).lower()


def _tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def _merges(data: bytes, count: int, name: str) -> list[tuple[str, str]]:
    """The first `count` merges; the first line is the file's version."""
    try:
        if data[:2] == b"\x1f\x8b":
            with gzip.open(io.BytesIO(data)) as file:
                data = file.read(LARGEST_FILE)
        lines = data[:LARGEST_FILE].decode().split("\n")[1 : count + 1]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} must be BPE merges, packed by gzip or not: {error}") from error
    pairs = [tuple(line.split()) for line in lines]
    if count < 0 or len(pairs) < count or any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"{name} must hold {count} merges, two words a line, for a model of "
            f"{count + 2 * BYTES + len(SPECIALS)} ids"
        )
    return [(pair[0], pair[1]) for pair in pairs]


def _byte_letters() -> list[str]:
    """A letter for every byte, in the order of their ids: printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = BYTES - len(printable)
    return [chr(byte) for byte in printable] + [chr(BYTES + number) for number in range(others)]
