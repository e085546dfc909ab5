"""The validation split: stable, apart, and seen by no training."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.crops import CropConfig
from pipelines.data.schema import FILTERED, tokens_schema
from pipelines.data.split import is_validation, read_split, rows_of, train_first
from pipelines.data.stage import Manifest
from pipelines.data.tokenizer import CaptionTokenizer, TokenizerConfig, train_tokenizer
from pipelines.evaluation.centre_squares import centre_squares
from pipelines.training.picture_loader import PictureLoader
from pipelines.training.token_loader import TokenLoader, read_tokens
from tests.fixtures.datasets import filtered_row, with_image_tokens, write_dataset
from tests.unit.test_near_duplicates import jpeg, scene


def contents(count: int) -> np.ndarray:
    digests = [hashlib.sha256(str(number).encode()).digest() for number in range(count)]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)


def test_the_share_held_out_is_the_one_asked_for() -> None:
    hashes = contents(20_000)
    for fraction in (0.0, 0.01, 0.3, 1.0):
        share = is_validation(hashes, fraction).mean()
        assert abs(share - fraction) <= 3 * (fraction * (1 - fraction) / 20_000) ** 0.5


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_holds_out_more_and_nothing_less(one: float, other: float) -> None:
    hashes = contents(200)
    smaller, larger = (is_validation(hashes, fraction) for fraction in sorted((one, other)))
    assert not (smaller & ~larger).any()


@given(st.lists(st.booleans(), max_size=30))
def test_a_shard_has_its_training_rows_first_and_in_order(sides: list[bool]) -> None:
    names = ["validation" if side else "train" for side in sides]
    table = pa.table({"split": pa.array(names, pa.string()), "n": range(len(names))})
    rows = train_first(table).to_pylist()
    assert rows == sorted(table.to_pylist(), key=lambda row: (row["split"], row["n"]))


def pictures(path: Path, rows: int = 24) -> Manifest:
    """Every third picture is held out, in shards of 8; the last shard holds no training row."""
    pairs = [
        filtered_row(f"picture {number}", jpeg(scene(number)))
        | {"split": "validation" if number % 3 == 0 or number >= 16 else "train"}
        for number in range(rows)
    ]
    parts = [pa.Table.from_pylist(pairs[i : i + 8], schema=FILTERED) for i in range(0, rows, 8)]
    table = pa.concat_tables(map(train_first, parts))
    return write_dataset(path, "filter_pairs", table, inputs={}, rows_per_shard=8)


def keys_of(manifest: Manifest, side: str) -> set[str]:
    table = pa.concat_tables(manifest.tables(["key", "split"]))
    return {row["key"] for row in table.to_pylist() if row["split"] == side}


@pytest.mark.parametrize("side", ["train", "validation"])
def test_a_picture_loader_sees_one_side_and_all_of_it(tmp_path: Path, side: str) -> None:
    manifest = pictures(tmp_path)
    crops = CropConfig(scale_low=1.0, scale_high=1.0, flip=False)
    for rank in (0, 1):
        loader = PictureLoader(
            manifest,
            crops,
            image_size=64,
            batch_samples=4,
            seed=0,
            rank=rank,
            world_size=2,
            split=side,  # type: ignore[arg-type]
        )
        seen = {key for step in range(60) for key in loader.keys(step)}
        assert seen <= keys_of(manifest, side)
        assert len(loader) == len(keys_of(manifest, side))
    assert {key for step in range(99) for key in loader.keys(step)} == keys_of(manifest, side)
    decoded = loader.batch(0).pixels
    assert len(decoded) == 2


def test_a_picture_loader_trains_unless_it_is_told_otherwise(tmp_path: Path) -> None:
    manifest = pictures(tmp_path)
    loader = PictureLoader(manifest, CropConfig(), image_size=64, batch_samples=2, seed=0)
    assert len(loader) == len(keys_of(manifest, "train"))


def test_the_squares_that_are_judged_are_of_the_split_asked_for(tmp_path: Path) -> None:
    manifest = pictures(tmp_path)
    for side in ("train", "validation"):
        count = len(keys_of(manifest, side))
        squares = centre_squares(manifest, 64, count, side)
        assert {square.key for square in squares if square} == keys_of(manifest, side)


def tokens(path: Path) -> Manifest:
    filtered = pictures(path / "filtered")
    table = pa.concat_tables(filtered.tables(["key", "caption", "split"]))
    sides = table["split"]
    table = with_image_tokens(table.drop_columns(["split"]), 4, 16)
    table = table.set_column(table.schema.get_field_index("split"), "split", sides)
    schema = tokens_schema(4, stage_one="dvae", dvae_sha256="0" * 64, tokenizer_sha256="0" * 64)
    return write_dataset(
        path / "tokens", "encode_pairs", table.cast(schema), inputs={}, rows_per_shard=8
    )


@pytest.mark.parametrize("side", ["train", "validation"])
def test_a_token_loader_holds_one_side_and_all_of_it(tmp_path: Path, side: str) -> None:
    manifest = tokens(tmp_path)
    tokenizer = CaptionTokenizer(train_tokenizer(["a picture"], TokenizerConfig()), "test")
    loader = TokenLoader(
        manifest,
        tokenizer,
        text_len=8,
        batch_samples=2,
        bpe_dropout=0.0,
        seed=0,
        split=side,  # type: ignore[arg-type]
    )
    assert set(loader.keys) == keys_of(manifest, side)
    everything = dict(zip(read_tokens(manifest)[0], read_tokens(manifest)[2], strict=True))
    for key, row in zip(loader.keys, loader.image_tokens, strict=True):
        np.testing.assert_array_equal(row, everything[key])


def test_captions_are_read_from_one_side(tmp_path: Path) -> None:
    manifest = pictures(tmp_path)
    keys = [
        key
        for part in manifest.shards
        for key in read_split(manifest, part.shard, ["key"], "train")["key"].to_pylist()
    ]
    assert set(keys) == keys_of(manifest, "train")
    assert len(keys) == len(set(keys))


def test_a_dataset_without_a_split_is_refused_in_words(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([filtered_row("a", jpeg(scene(0)))], schema=FILTERED)
    manifest = write_dataset(tmp_path, "filter_pairs", table.drop_columns(["split"]), inputs={})
    with pytest.raises(ValueError, match="must have a column 'split': it was made by an older"):
        PictureLoader(manifest, CropConfig(), image_size=64, batch_samples=2, seed=0)


@pytest.mark.parametrize(
    "sides", [["validation", "train"], ["train", "validation", "train"], ["train", "test"]]
)
def test_a_shard_whose_sides_are_mixed_is_refused(tmp_path: Path, sides: list[str]) -> None:
    pairs = [filtered_row(f"{n}", b"x") | {"split": side} for n, side in enumerate(sides)]
    table = pa.Table.from_pylist(pairs, schema=FILTERED)
    manifest = write_dataset(tmp_path, "filter_pairs", table, inputs={})
    with pytest.raises(ValueError, match="must hold its train rows, then its validation rows"):
        rows_of(manifest, "train")
