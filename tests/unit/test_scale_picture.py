"""The resblocks' records: kept, rewound, drawn."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.training.block_history import BLOCKS_FILE, BlockHistory, BlockRecord
from pipelines.training.scale_picture import GAP, HEIGHT, MISSING, OVERFLOW, WIDTH, scale_picture

BLOCKS = 16


def record(step: int, overflowed: tuple[int, ...] = (), lost: tuple[int, ...] = ()) -> BlockRecord:
    overflows, norms = np.zeros(BLOCKS, np.float32), np.full(BLOCKS, 2.0**-step, np.float32)
    overflows[list(overflowed)] = 2
    norms[list(lost)] = np.inf
    return BlockRecord(step, np.linspace(7, 24, BLOCKS, dtype=np.float32), overflows, norms)


def cells(picture: np.ndarray, colour: tuple[int, int, int], records: int) -> float:
    """Cells of a colour, in a picture of that many records."""
    return float((picture == colour).all(axis=2).sum()) / (WIDTH / records * HEIGHT / BLOCKS)


def test_a_cell_is_red_where_a_block_overflowed_and_grey_where_its_norm_is_lost() -> None:
    records = [record(step) for step in range(16)]
    calm = scale_picture(records, "update 16")
    assert calm.dtype == np.uint8
    assert calm.shape[1] == WIDTH + 2 * GAP
    assert cells(calm, OVERFLOW, 16) == cells(calm, MISSING, 16) == 0
    records[3] = record(3, overflowed=(0, 5), lost=(0, 5))
    records[9] = record(9, overflowed=(7,))
    picture = scale_picture(records, "update 16")
    assert cells(picture, OVERFLOW, 16) == pytest.approx(3)
    assert cells(picture, MISSING, 16) == pytest.approx(2)


def test_an_overflow_is_seen_however_many_records_there_are() -> None:
    records = [record(step % 20) for step in range(5 * WIDTH + 3)]
    records[1234] = record(4, overflowed=(2,))
    picture = scale_picture(records, "")
    assert cells(picture, OVERFLOW, WIDTH) == pytest.approx(1)


def test_the_first_resblock_is_at_the_top_and_a_large_scale_is_dark() -> None:
    picture = scale_picture([record(0)], "")
    column = picture[:, GAP + WIDTH // 2].astype(int).sum(axis=1)
    panel = column[2 * 25 : 2 * 25 + HEIGHT]
    assert (np.diff(panel) <= 0).all()
    assert panel[0] - panel[-1] > 400


def test_no_records_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        scale_picture([], "")


def test_records_are_read_back_and_rewound(tmp_path: Path) -> None:
    history = BlockHistory(tmp_path)
    history.rewind(0)
    for step in (10, 20, 30):
        history.add(record(step, overflowed=(1,), lost=(2,)))
    with (tmp_path / BLOCKS_FILE).open("a") as file:
        file.write('{"step":40,"log2_sc')  # killed while it wrote
    resumed = BlockHistory(tmp_path)
    resumed.rewind(20)
    assert [kept.step for kept in resumed.records] == [10, 20]
    for kept, written in zip(resumed.records, history.records, strict=False):
        np.testing.assert_allclose(kept.scales, written.scales, atol=0.005)
        np.testing.assert_array_equal(kept.overflows, written.overflows)
        np.testing.assert_allclose(kept.norms, written.norms, rtol=0.005)
    resumed.add(record(30))
    again = BlockHistory(tmp_path)
    again.rewind(1000)
    assert [kept.step for kept in again.records] == [10, 20, 30]
