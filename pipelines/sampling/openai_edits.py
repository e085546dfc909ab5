"""POST /v1/images/edits: a picture's upper rows are kept, the rest is drawn (paper, figure 2(d)).

The area to be drawn is a mask's, or the picture's own transparent one, or is said in rows
(`keep_rows`, ours). It must be a band at the lower edge: the prior draws from top to bottom.

Letters: H and W the sides of the picture that was sent.
"""

import dataclasses
import io
import warnings
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

from pipelines.data.decode import UnusablePicture, decode_picture
from pipelines.data.resize import DECODE_FAILURES, FORMATS
from pipelines.sampling.api import (
    FIELDS,
    Delivery,
    ImagesRequest,
    RandomSeed,
    ServedModel,
    wanted_delivery,
    wanted_pictures,
)
from pipelines.sampling.multipart import Part
from pipelines.sampling.openai_errors import ApiError
from pipelines.sampling.openai_fields import Fields, given_twice, missing

EDIT_BODY_BYTES = 8 * 1024 * 1024
# Four bytes a pixel while it is decoded: 64 MB. A photograph of a phone has half as many.
MOST_PIXELS = 4096 * 4096
PICTURES = {"image": "image", "image[]": "image", "mask": "mask"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditForm:
    """An edit whose words are checked and whose pictures are not opened yet."""

    request: ImagesRequest
    delivery: Delivery
    image: bytes
    mask: bytes | None
    keep_rows: int | None


def parse_edit(parts: Sequence[Part], model: ServedModel, random_seed: RandomSeed) -> EditForm:
    """The form's fields; raises ApiError naming the first one that is wrong."""
    texts: dict[str, str] = {}
    pictures: dict[str, bytes] = {}
    for part in parts:
        if name := PICTURES.get(part.name):
            if name in pictures:
                raise ApiError(
                    f"There must be one {name}, got several.", param=name, code="too_many_pictures"
                )
            pictures[name] = part.data
        elif part.name in texts:
            raise given_twice(part.name)
        else:
            texts[part.name] = part.text()
    fields = Fields(texts, (*FIELDS, "image", "mask", "keep_rows"), texts=True)
    if model.first_rows is None:
        raise ApiError("This server completes no pictures.", status=404, code="not_supported")
    request, delivery = wanted_pictures(fields, model, random_seed), wanted_delivery(fields)
    if "image" not in pictures:
        raise missing("image")
    keep = fields.integer("keep_rows", 0, lowest=1, highest=model.grid - 1)
    if keep and "mask" in pictures:
        raise ApiError(
            "keep_rows must be absent where there is a mask: both say what is kept.",
            param="keep_rows",
            code="unsupported_value",
        )
    return EditForm(
        request=request,
        delivery=delivery,
        image=pictures["image"],
        mask=pictures.get("mask"),
        keep_rows=keep or None,
    )


def begun(form: EditForm, model: ServedModel) -> ImagesRequest:
    """The request with the image tokens that its pictures start from.

    Decodes pictures and runs the encoder: it takes its time. Raises ApiError for bytes that are no
    picture, and for an area that is no lower band.
    """
    assert model.first_rows is not None
    _check_size("image", form.image)
    try:
        pixels = decode_picture(form.image)
    except UnusablePicture as error:
        raise _unusable("image", str(error)) from None
    height, width = pixels.shape[:2]
    if height != width:
        raise _unusable("image", f"it is {width}x{height}, and must be square")
    rows = form.keep_rows or _kept_rows(form, height, model.grid)
    if height != model.image_size:
        cv2.setNumThreads(1)
        side = (model.image_size, model.image_size)
        shrinks = height > model.image_size
        pixels = cv2.resize(
            pixels, side, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
        )
    return dataclasses.replace(form.request, start=model.first_rows(pixels, rows))


def _kept_rows(form: EditForm, side: int, grid: int) -> int:
    """Rows of the grid that the transparent area leaves; half of them where there is none."""
    name = "image" if form.mask is None else "mask"
    if form.mask is not None:
        _check_size(name, form.mask)
    clear = _transparent(name, form.image if form.mask is None else form.mask)
    if form.mask is None and (clear is None or not clear.any()):
        return grid // 2
    if clear is None or not clear.any():
        raise _unusable(name, "it has no transparent area, which is what is drawn")
    if clear.shape != (side, side):
        found = f"{clear.shape[1]}x{clear.shape[0]}"
        raise _unusable(name, f"it is {found}, and must be as large as image, {side}x{side}")
    top = int(clear.all(axis=1).argmax())
    if not clear[top:].all() or clear[:top].any():
        raise _unusable(
            name,
            "its transparent area must be a band from one side to the other, down to the lower "
            "edge: the model draws from top to bottom",
        )
    if (rows := top * grid // side) == 0:
        raise _unusable(
            name,
            f"it must leave at least the upper {-(-side // grid)} of {side} pixel rows, got {top}",
        )
    return rows


def _transparent(name: str, data: bytes) -> np.ndarray | None:
    """Where a picture is fully transparent, bool (H, W); None if it knows no transparency."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            if "A" not in picture.getbands() and "transparency" not in picture.info:
                return None
            return np.asarray(picture.convert("RGBA").getchannel("A")) == 0
        except DECODE_FAILURES as error:
            raise _unusable(name, type(error).__name__) from None


def _check_size(name: str, data: bytes) -> None:
    """Refuse by the header, before anything is decoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            width, height = Image.open(io.BytesIO(data), formats=FORMATS).size
        except (Image.DecompressionBombError, *DECODE_FAILURES):
            raise _unusable(name, f"it is none of {', '.join(FORMATS)}") from None
    if width * height > MOST_PIXELS:
        raise _unusable(name, f"it is {width}x{height}, and may have {MOST_PIXELS:,} pixels")


def _unusable(name: str, why: str) -> ApiError:
    return ApiError(
        f"{name} must be a picture that can be completed, but {why}.",
        param=name,
        code="invalid_image",
    )
