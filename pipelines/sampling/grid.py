"""Grids of pictures with a few words beside them: each row is a caption and its pictures."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SMALLEST_SIDE = 96  # pictures below are magnified by whole steps, so that a person sees something
TEXT_WIDTH = 176
TEXT_SIZE = 14
TEXT_LINES = 6
GAP = 4
PAPER = (255, 255, 255)
INK = (20, 20, 20)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Row = tuple[str, Sequence[np.ndarray]]


def captioned_rows(rows: Sequence[Row], *, headings: Sequence[str] = ()) -> np.ndarray:
    """One picture (H, W, 3) uint8 of rows: a caption, then its square pictures (h, h, 3) uint8.

    `headings` name the columns, the first being the captions'. Rows may differ in length.
    """
    if not rows or not any(pictures for _, pictures in rows):
        raise ValueError("rows must hold at least one picture, got none")
    side, scale = _cell_side(rows)
    font = ImageFont.load_default(TEXT_SIZE)
    line = int(font.getbbox("Ág")[3]) + 2
    top = line + 2 * GAP if headings else GAP
    columns = max(len(pictures) for _, pictures in rows)
    width = TEXT_WIDTH + columns * (side + GAP) + GAP
    canvas = Image.new("RGB", (width, top + len(rows) * (side + GAP)), PAPER)
    pen = ImageDraw.Draw(canvas)
    for index, heading in enumerate(headings):
        left = GAP if index == 0 else TEXT_WIDTH + (index - 1) * (side + GAP)
        pen.text((left, GAP), _fit(heading, TEXT_WIDTH if index == 0 else side, font), INK, font)
    for index, (caption, pictures) in enumerate(rows):
        y = top + index * (side + GAP)
        for number, words in enumerate(_wrap(caption, TEXT_WIDTH - 2 * GAP, font, side // line)):
            pen.text((GAP, y + number * line), words, INK, font)
        for column, picture in enumerate(pictures):
            canvas.paste(_enlarge(picture, scale), (TEXT_WIDTH + column * (side + GAP), y))
    return np.asarray(canvas)


def picture_rows(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Rows of equally large pictures (h, w, 3) uint8 without words, as one picture."""
    sides = {picture.shape for row in rows for picture in row}
    if len(sides) != 1:
        raise ValueError(f"rows must hold pictures of one size, got {sorted(sides)}")
    blank = np.full(next(iter(sides)), 255, np.uint8)
    columns = max(len(row) for row in rows)
    filled = [[*row, *([blank] * (columns - len(row)))] for row in rows]
    return np.concatenate([np.concatenate(row, axis=1) for row in filled])


def png(pixels: np.ndarray) -> bytes:
    """A picture (H, W, 3) uint8 as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def _cell_side(rows: Sequence[Row]) -> tuple[int, int]:
    """Side of a cell in pixels and the magnification that makes the largest picture fill it."""
    sides = [max(picture.shape[:2]) for _, pictures in rows for picture in pictures]
    scale = max(1, -(-SMALLEST_SIDE // max(sides)))
    return max(sides) * scale, scale


def _enlarge(picture: np.ndarray, scale: int) -> Image.Image:
    image = Image.fromarray(picture)
    size = (image.width * scale, image.height * scale)
    return image.resize(size, Image.Resampling.NEAREST)


def _wrap(text: str, width: int, font: Font, limit: int) -> list[str]:
    """Lines no wider than `width`, at most `limit`; an ellipsis stands for what is left out."""
    limit = max(1, min(limit, TEXT_LINES))
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > limit:
        lines = [*lines[: limit - 1], f"{lines[limit - 1]} …"]
    return [_fit(words, width, font) for words in lines]


def _fit(text: str, width: int, font: Font) -> str:
    """The text, cut with an ellipsis to a width in pixels."""
    if font.getlength(text) <= width:
        return text
    text = text.removesuffix(" …")
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
