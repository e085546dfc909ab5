"""POST /v1/images/generations in the shape of OpenAI's Images API: what comes in, what goes out.

Pure functions of bytes and values, no server: a request is taken apart field by field, and whatever
is unknown or unsupported is refused by name instead of ignored.
"""

import base64
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipelines.sampling.drawing import ALL_CODES, LARGEST_SEED, SamplingConfig
from pipelines.sampling.engine import Sample

MOST_PICTURES = 10  # OpenAI's limit of n
BODY_BYTES = 64 * 1024
REQUEST_ERROR = "invalid_request_error"


class ApiError(Exception):
    """An answer in OpenAI's error envelope; `param` is the field that is wrong, if it is one."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = REQUEST_ERROR,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.type = message, status, type
        self.param, self.code, self.headers = param, code, dict(headers or {})

    def envelope(self) -> dict[str, Any]:
        fields = ("message", "type", "param", "code")
        return {"error": {name: getattr(self, name) for name in fields}}


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What requests are checked against."""

    name: str
    created: int
    """Unix time of the model file."""
    image_size: int
    image_tokens: int
    vocab_size: int
    check_prompt: Callable[[str], int]
    """The prompt's length in tokens; raises ValueError if the model cannot take it."""

    @property
    def size(self) -> str:
        return f"{self.image_size}x{self.image_size}"

    def card(self) -> dict[str, Any]:
        """An entry of GET /v1/models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "manray",
        }


@dataclass(frozen=True, kw_only=True)
class ImagesRequest:
    """A request that the model can answer."""

    prompt: str
    prompt_tokens: int
    n: int
    seed: int
    sampling: SamplingConfig


def parse_request(body: bytes, model: ServedModel, random_seed: Callable[[], int]) -> ImagesRequest:
    """The request in a body; raises ApiError naming the first field that is wrong.

    Fields: prompt, model, n (1), size ("auto"), response_format ("b64_json"), user (accepted and
    ignored: nothing is kept of a request), and our own seed, temperature (1) and top_k (all codes).
    Null is as good as absent where a field has a default.
    """
    fields = _parse_json(body)
    known = (
        *("prompt", "model", "n", "size", "response_format", "user"),
        *("seed", "temperature", "top_k"),
    )
    for name in fields:
        if name not in known:
            raise ApiError(
                f"Unknown parameter: {_shown(name)!r}. This server takes {', '.join(known)}.",
                param=_shown(name),
                code="unknown_parameter",
            )
    fields = {name: value for name, value in fields.items() if value is not None}
    _check_choice(fields, "response_format", ("b64_json",))
    _check_choice(fields, "size", ("auto", model.size))
    _check_model(fields, model)
    _string(fields, "user", "")
    prompt = _string(fields, "prompt", None)
    try:
        prompt_tokens = model.check_prompt(prompt)
    except ValueError as error:
        raise ApiError(str(error), param="prompt", code="invalid_prompt") from error
    return ImagesRequest(
        prompt=prompt,
        prompt_tokens=prompt_tokens,
        n=_integer(fields, "n", 1, lowest=1, highest=MOST_PICTURES),
        seed=_integer(fields, "seed", -1, lowest=0, highest=LARGEST_SEED)
        if "seed" in fields
        else random_seed(),
        sampling=SamplingConfig(
            temperature=_temperature(fields),
            top_k=_integer(fields, "top_k", ALL_CODES, lowest=1, highest=model.vocab_size),
        ),
    )


def render_response(
    request: ImagesRequest, model: ServedModel, samples: Sequence[Sample], *, created: int
) -> dict[str, Any]:
    """The answer's JSON; asking again with a picture's own seed and n = 1 gives that picture."""
    output_tokens = len(samples) * model.image_tokens
    return {
        "created": created,
        "data": [
            {"b64_json": base64.b64encode(png(sample.pixels)).decode(), "seed": sample.seed}
            for sample in samples
        ],
        "output_format": "png",
        "size": model.size,
        "usage": {
            "input_tokens": request.prompt_tokens,
            "input_tokens_details": {"text_tokens": request.prompt_tokens, "image_tokens": 0},
            "output_tokens": output_tokens,
            "total_tokens": request.prompt_tokens + output_tokens,
        },
    }


def png(pixels: np.ndarray) -> bytes:
    """A picture (H, W, 3) uint8 as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def _parse_json(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ApiError("The body must be a flat JSON object, it is nested too deeply.") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are kinds of it
        raise ApiError(f"The body must be valid JSON in UTF-8: {str(error)[:200]}.") from None
    if not isinstance(fields, dict):
        raise ApiError(f"The body must be a JSON object, got {_kind(fields)}.")
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ApiError(f"Parameter given twice: {_shown(name)!r}.", param=_shown(name))
        fields[name] = value
    return fields


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _check_choice(fields: Mapping[str, Any], name: str, choices: Sequence[str]) -> None:
    value = _string(fields, name, choices[0])
    if value not in choices:
        raise ApiError(
            f"{name} must be one of {', '.join(choices)}, got {_shown(value)!r}.", param=name
        )


def _check_model(fields: Mapping[str, Any], model: ServedModel) -> None:
    name = _string(fields, "model", model.name)
    if name != model.name:
        raise ApiError(
            f"The model {_shown(name)!r} does not exist; this server has {model.name!r}.",
            status=404,
            param="model",
            code="model_not_found",
        )


def _string(fields: Mapping[str, Any], name: str, default: str | None) -> str:
    value = fields.get(name, default)
    if value is None:
        raise ApiError(f"Missing required parameter: {name}.", param=name, code="missing_parameter")
    if not isinstance(value, str):
        raise _wrong_type(name, "a string", value)
    return value


def _integer(
    fields: Mapping[str, Any], name: str, default: int, *, lowest: int, highest: int
) -> int:
    if name not in fields:
        return default
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int):  # in Python, true is an int
        raise _wrong_type(name, "an integer", value)
    if not lowest <= value <= highest:
        raise ApiError(
            f"{name} must be {lowest} to {highest}, got {str(value)[:32]}.",
            param=name,
            code="out_of_range",
        )
    return value


def _temperature(fields: Mapping[str, Any]) -> float:
    value = fields.get("temperature", 1.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _wrong_type("temperature", "a number", value)
    # 1e999 is read as infinity, and an integer may be larger than any float.
    if not 0 < value < 1e300 or not math.isfinite(value):
        raise ApiError(
            f"temperature must be positive and finite, got {str(value)[:32]}.",
            param="temperature",
            code="out_of_range",
        )
    return float(value)


def _wrong_type(name: str, wanted: str, value: Any) -> ApiError:
    return ApiError(
        f"{name} must be {wanted}, got {_kind(value)}.", param=name, code="invalid_type"
    )


def _shown(text: str) -> str:
    """The start of a text that came in, fit for an answer: half a surrogate pair is not."""
    return text[:64].encode(errors="backslashreplace").decode()


def _kind(value: Any) -> str:
    """What JSON calls it."""
    if isinstance(value, bool):
        return "a boolean"
    names = {str: "a string", int: "an integer", float: "a number", list: "an array"}
    return {dict: "an object", type(None): "null"}.get(type(value)) or names[type(value)]
