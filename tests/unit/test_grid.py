"""Grids of pictures for people."""

import numpy as np
import pytest

from pipelines.sampling.grid import GAP, SMALLEST_SIDE, TEXT_WIDTH, captioned_rows, picture_rows


def plain(colour: int, side: int = 48) -> np.ndarray:
    return np.full((side, side, 3), colour, np.uint8)


def test_pictures_stand_beside_their_captions_magnified_by_whole_steps() -> None:
    rows = [("red apple", [plain(10), plain(20)]), ("a dog " * 40, [plain(30)])]
    grid = captioned_rows(rows, headings=["prompt", "original", "sampled"])
    assert grid.dtype == np.uint8
    assert grid.shape[1] == TEXT_WIDTH + 2 * (SMALLEST_SIDE + GAP) + GAP
    for column, row, colour in ((0, 0, 10), (1, 0, 20), (0, 1, 30)):
        left = TEXT_WIDTH + column * (SMALLEST_SIDE + GAP)
        bottom = grid.shape[0] - GAP - (1 - row) * (SMALLEST_SIDE + GAP)
        cell = grid[bottom - SMALLEST_SIDE : bottom, left : left + SMALLEST_SIDE]
        assert (cell == colour).all()
    # A caption however long stays in its column and leaves no ink between the columns.
    assert (grid[:, TEXT_WIDTH - GAP : TEXT_WIDTH] == 255).all()
    assert (grid[-SMALLEST_SIDE:, : TEXT_WIDTH - GAP] < 128).any()


def test_large_pictures_keep_their_size() -> None:
    grid = captioned_rows([("x", [plain(5, side=200)])])
    assert grid.shape == (GAP + 200 + GAP, TEXT_WIDTH + 200 + 2 * GAP, 3)


@pytest.mark.parametrize("caption", ["", "苹果 🍎", "w" * 500, "a\nb\tc"])
def test_any_caption_can_be_drawn(caption: str) -> None:
    captioned_rows([(caption, [plain(0)])])


def test_a_grid_without_pictures_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        captioned_rows([("red apple", [])])


def test_rows_without_captions_stand_edge_to_edge() -> None:
    grid = picture_rows([[plain(1), plain(2)], [plain(3)]])
    assert grid.shape == (96, 96, 3)
    assert grid[0, 0, 0] == 1
    assert grid[0, 95, 0] == 2
    assert grid[95, 0, 0] == 3
    assert grid[95, 95, 0] == 255
    with pytest.raises(ValueError, match="one size"):
        picture_rows([[plain(1), plain(2, side=32)]])
