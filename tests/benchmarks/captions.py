"""Captions to ids: our seeded BPE dropout against the library's, which cannot be seeded."""

import json
import random

import pyarrow.parquet as pq
from tokenizers import Tokenizer

from pipelines.data.tokenizer import CaptionTokenizer, TokenizerConfig, train_tokenizer
from tests.benchmarks.measure import Effort, Row, compare_speed
from tests.fixtures.datasets import CORPUS

DROPOUT = 0.1  # the paper's
TEXT_LEN = 256  # the paper's


def rows(effort: Effort) -> list[Row]:
    """The corpus's captions, one at a time as the training loader asks for them."""
    corpus = pq.read_table(CORPUS, columns=["caption"])["caption"].to_pylist()
    data = train_tokenizer(corpus, TokenizerConfig())
    ours = CaptionTokenizer(data, "corpus")
    theirs = library_with_dropout(data)
    captions = [corpus[index % len(corpus)] for index in range(effort.rows)]
    rng = random.Random(0)
    return [
        compare_speed(
            "caption-bpe-dropout",
            peer="tokenizers (Rust), unseeded",
            precision="exact",
            work=len(captions),
            what="captions",
            ours=lambda: [
                ours.encode(text, TEXT_LEN, dropout=DROPOUT, rng=rng) for text in captions
            ],
            theirs=lambda: [theirs.encode(text).ids for text in captions],
            repeats=effort.repeats,
            packages=("tokenizers",),
        )
    ]


def library_with_dropout(data: bytes) -> Tokenizer:
    content = json.loads(data)
    content["model"]["dropout"] = DROPOUT
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = True
    tokenizer.enable_truncation(TEXT_LEN)
    tokenizer.enable_padding(length=TEXT_LEN)
    return tokenizer
