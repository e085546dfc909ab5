"""Answers of the Images API: the JSON of a whole one, and the events of a streamed one.

Letters: H and W the picture's sides.
"""

import base64
import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from pipelines.sampling.api import Delivery, ImagesRequest, ServedModel
from pipelines.sampling.drawing import candidate_seed
from pipelines.sampling.picture_source import PartialPicture, RankedPicture

Kind = Literal["image_generation", "image_edit"]


def render_response(
    request: ImagesRequest,
    delivery: Delivery,
    model: ServedModel,
    pictures: Sequence[RankedPicture],
    *,
    created: int,
) -> dict[str, Any]:
    """The whole answer; asking again with a picture's own seed and n = 1 gives that picture."""
    return {
        "created": created,
        "data": [
            {
                "b64_json": encoded(picture.sample.pixels, delivery),
                "seed": picture.sample.seed,
                "score": picture.score,
            }
            for picture in pictures
        ],
        **_manner(delivery, model),
        "background": "opaque",
        "usage": usage(request, model, request.candidates, prompts=1),
    }


def partial_event(
    kind: Kind,
    request: ImagesRequest,
    picture: PartialPicture,
    number: int,
    delivery: Delivery,
    model: ServedModel,
    *,
    created: int,
) -> dict[str, Any]:
    """A picture while it is drawn, the `number`-th time that it is shown.

    `index`, `rows` and `seed` are ours: by its seed a candidate is found among the ranked.
    """
    return {
        "type": f"{kind}.partial_image",
        "b64_json": encoded(picture.pixels, delivery),
        "partial_image_index": number,
        "index": picture.index,
        "rows": picture.rows,
        "seed": candidate_seed(request.seed, picture.index),
        "created_at": created,
        **_event_manner(delivery, model),
    }


def completed_event(
    kind: Kind,
    request: ImagesRequest,
    picture: RankedPicture,
    rank: int,
    delivery: Delivery,
    model: ServedModel,
    *,
    created: int,
) -> dict[str, Any]:
    """A finished picture, the `rank`-th best; `index`, `seed` and `score` are ours.

    The usage of all events together is the request's: what was drawn in vain is the first one's.
    """
    drawn = request.candidates - request.n + 1 if rank == 0 else 1
    return {
        "type": f"{kind}.completed",
        "b64_json": encoded(picture.sample.pixels, delivery),
        "index": rank,
        "seed": picture.sample.seed,
        "score": picture.score,
        "created_at": created,
        **_event_manner(delivery, model),
        "usage": usage(request, model, drawn, prompts=int(rank == 0)),
    }


def usage(
    request: ImagesRequest, model: ServedModel, pictures: int, *, prompts: int
) -> dict[str, Any]:
    """What was read and drawn, in tokens; a pool's losers were drawn too."""
    given = 0 if request.start is None else len(request.start)
    text, kept = prompts * request.prompt_tokens, prompts * given
    drawn = pictures * (model.image_tokens - given)
    return {
        "input_tokens": text + kept,
        "input_tokens_details": {"text_tokens": text, "image_tokens": kept},
        "output_tokens": drawn,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": drawn},
        "total_tokens": text + kept + drawn,
    }


def encoded(pixels: np.ndarray, delivery: Delivery) -> str:
    """A picture (H, W, 3) uint8 as a file of the wanted format, in base64."""
    file = io.BytesIO()
    picture = Image.fromarray(pixels)
    if delivery.output_format == "png":
        picture.save(file, "PNG")
    else:
        quality = delivery.output_compression
        picture.save(file, delivery.output_format.upper(), quality=quality)
    return base64.b64encode(file.getvalue()).decode()


def _manner(delivery: Delivery, model: ServedModel) -> dict[str, Any]:
    manner = {"output_format": delivery.output_format, "size": model.size}
    return manner | ({"safety_identifier": delivery.user} if delivery.user else {})


def _event_manner(delivery: Delivery, model: ServedModel) -> dict[str, Any]:
    return _manner(delivery, model) | {"background": "opaque", "quality": "auto"}
