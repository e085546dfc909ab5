import numpy as np
import pytest

from pipelines.training.codebook_picture import PANEL, UNUSED, codebook_picture


def red(picture: np.ndarray) -> int:
    return int((picture[:, : PANEL + 24] == UNUSED).all(axis=2).sum())


@pytest.mark.parametrize("size", [1, 12, 128, 8192])
def test_the_picture_holds_a_cell_for_each_code(size: int) -> None:
    counts = np.arange(size) + 1
    full = codebook_picture(counts, "update 1")
    assert full.dtype == np.uint8
    assert full.shape[2] == 3
    assert red(full) == 0
    empty = codebook_picture(np.zeros(size, np.int64), "update 1")
    assert red(empty) > 0.9 * PANEL * PANEL * size / np.ceil(np.sqrt(size)) ** 2 * 0.9


def test_unused_codes_are_red_in_proportion() -> None:
    counts = np.ones(1024, np.int64)
    counts[:256] = 0
    assert red(codebook_picture(counts, "")) == pytest.approx(PANEL * PANEL / 4, rel=0.01)


def test_counts_that_are_no_codebook_are_refused() -> None:
    with pytest.raises(ValueError, match="counts"):
        codebook_picture(np.zeros((2, 2), np.int64), "")
