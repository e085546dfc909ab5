import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipelines.data.crops import CropConfig
from pipelines.data.schema import FILTERED
from pipelines.data.stage import Manifest
from pipelines.training.picture_loader import PictureBatch, PictureLoader, prefetch
from tests.fixtures.datasets import filtered_row, write_dataset

ROWS = 150  # five shards of 32: more than one window


def pictures(path: Path, *, rows: int = ROWS, side: int = 12, broken: int = 0) -> Manifest:
    """Pictures of one grey each, by which they are told apart."""
    table = []
    for number in range(rows):
        buffer = io.BytesIO()
        Image.new("RGB", (side, side), (number,) * 3).save(buffer, "PNG")
        data = b"no picture" if number < broken else buffer.getvalue()
        table.append(filtered_row(f"grey {number}", data) | {"width": side, "height": side})
    return write_dataset(
        path, "filter_pairs", pa.Table.from_pylist(table, schema=FILTERED), inputs={}
    )


def loader(manifest: Manifest, **overrides: Any) -> PictureLoader:
    values: dict[str, Any] = {"image_size": 8, "batch_samples": 10, "seed": 1} | overrides
    return PictureLoader(manifest, CropConfig(), **values)


def greys(batch: PictureBatch) -> list[int]:
    return batch.pixels[:, 0, 0, 0].tolist()


def test_every_picture_comes_once_an_epoch_in_an_order_of_its_own(tmp_path: Path) -> None:
    reader = loader(pictures(tmp_path))
    epochs = [
        [grey for step in range(first, first + 15) for grey in greys(reader.batch(step))]
        for first in (0, 15)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(ROWS))
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])


def test_a_batch_depends_on_its_number_alone(tmp_path: Path) -> None:
    manifest = pictures(tmp_path)
    first = loader(manifest)
    batches = [first.batch(step).pixels for step in range(8)]
    assert torch.equal(loader(manifest).batch(7).pixels, batches[7])
    assert not torch.equal(loader(manifest, seed=2).batch(7).pixels, batches[7])


def test_the_ranks_share_the_batch_that_one_would_have(tmp_path: Path) -> None:
    manifest = pictures(tmp_path)
    whole = loader(manifest).batch(3).pixels
    for size in (2, 5):
        ranks = [loader(manifest, rank=rank, world_size=size) for rank in range(size)]
        assert torch.equal(torch.cat([rank.batch(3).pixels for rank in ranks]), whole)
    with pytest.raises(ValueError, match="batch_samples must divide"):
        loader(manifest, world_size=3)


def test_prefetched_batches_are_the_same_ones(tmp_path: Path) -> None:
    reader = loader(pictures(tmp_path))
    with prefetch(reader.batch, 2, 6) as batches:
        for step, batch in enumerate(batches, 2):
            assert torch.equal(batch.pixels, reader.batch(step).pixels)
    assert step == 5


def test_a_stream_that_is_left_early_ends(tmp_path: Path) -> None:
    reader = loader(pictures(tmp_path))
    with prefetch(reader.batch, 0, 10**9) as batches:
        next(batches)


def test_an_error_of_the_reading_thread_reaches_the_caller() -> None:
    def fail(step: int) -> PictureBatch:
        raise ValueError(f"no batch {step}")

    with pytest.raises(ValueError, match="no batch 4"), prefetch(fail, 4, 9) as batches:
        next(batches)


def test_a_broken_picture_gives_way_to_the_next_one(tmp_path: Path) -> None:
    reader = loader(pictures(tmp_path, rows=20, broken=3), batch_samples=20)
    batch = reader.batch(0)
    seen = greys(batch)
    assert len(seen) == 20
    assert min(seen) >= 3
    assert batch.unusable >= 3


def test_pictures_that_are_all_too_small_are_refused_in_words(tmp_path: Path) -> None:
    reader = loader(pictures(tmp_path, rows=10), image_size=64)
    with pytest.raises(ValueError, match=r"pictures of at least 64 pixels.*too_small"):
        reader.batch(0)


def test_keys_name_the_pictures_of_a_batch(tmp_path: Path) -> None:
    manifest = pictures(tmp_path)
    reader = loader(manifest)
    table = pa.concat_tables(manifest.tables(["key", "caption"])).to_pylist()
    caption = {row["key"]: row["caption"] for row in table}
    assert [caption[key] for key in reader.keys(4)] == [
        f"grey {grey}" for grey in greys(reader.batch(4))
    ]


def test_the_pixels_arrive_channels_last(tmp_path: Path) -> None:
    batch = loader(pictures(tmp_path)).batch(0).pixels
    assert batch.shape == (10, 3, 8, 8)
    assert batch.dtype == torch.uint8
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(batch[0, :, 0, 0], batch[0, :, 7, 7])
