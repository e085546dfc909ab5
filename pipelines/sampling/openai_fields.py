"""The fields of a request, from JSON or from a form, each checked by name and type."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.sampling.openai_errors import ApiError, shown

# 1e999 is read as infinity, and an integer may be larger than any float.
LARGEST_NUMBER = 1e300
DIGITS = re.compile(r"-?[0-9]{1,20}")
DECIMAL = re.compile(r"-?[0-9]{1,32}(\.[0-9]{1,32})?([eE][-+]?[0-9]{1,3})?")


class Fields:
    """Values by name. Null is as good as absent where a field has a default.

    `texts`: the values are a form's, which knows no types: a number is written out.
    """

    def __init__(self, values: Mapping[str, Any], known: Sequence[str], *, texts: bool) -> None:
        """Raises ApiError naming the first field that is not `known`."""
        for name in values:
            if name not in known:
                raise ApiError(
                    f"Unknown parameter: {shown(name)!r}. This server takes {', '.join(known)}.",
                    param=shown(name),
                    code="unknown_parameter",
                )
        self._values = {name: value for name, value in values.items() if value is not None}
        self._texts = texts

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def string(self, name: str, default: str | None, *, longest: int | None = None) -> str:
        """A text; a default of None means that the field must be there."""
        value = self._values.get(name, default)
        if value is None:
            raise missing(name)
        if not isinstance(value, str):
            raise self._wrong_type(name, "a string")
        if longest is not None and len(value) > longest:
            raise ApiError(
                f"{name} must have at most {longest} characters, got {len(value)}.",
                param=name,
                code="string_too_long",
            )
        return value

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """One of a few texts, the first being the default."""
        value = self.string(name, choices[0])
        if value not in choices:
            raise ApiError(
                f"{name} must be one of {', '.join(choices)}, got {shown(value)!r}.",
                param=name,
                code="unsupported_value",
            )
        return value

    def boolean(self, name: str) -> bool:
        """True or false, which is the default."""
        value = self._values.get(name, False)
        if self._texts and value in ("true", "false"):
            value = value == "true"
        if not isinstance(value, bool):
            raise self._wrong_type(name, "a boolean")
        return value

    def integer(self, name: str, default: int, *, lowest: int, highest: int) -> int:
        """A whole number in a range; the default need not be in it."""
        if name not in self._values:
            return default
        value = self._values[name]
        if self._texts and isinstance(value, str) and DIGITS.fullmatch(value):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):  # in Python, true is an int
            raise self._wrong_type(name, "an integer")
        if not lowest <= value <= highest:
            raise _out_of_range(name, f"{lowest} to {highest}", value)
        return value

    def number(
        self,
        name: str,
        default: float,
        *,
        lowest: float,
        highest: float = LARGEST_NUMBER,
        above: bool = False,
    ) -> float:
        """A finite number in a range; with `above`, the lowest one is not in it."""
        if name not in self._values:
            return default
        value = self._values[name]
        if self._texts and isinstance(value, str) and DECIMAL.fullmatch(value):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong_type(name, "a number")
        small = value <= lowest if above else value < lowest
        if small or not value <= highest or not math.isfinite(value):
            start = f"above {lowest:g}" if above else f"at least {lowest:g}"
            end = "finite" if highest == LARGEST_NUMBER else f"at most {highest:g}"
            raise _out_of_range(name, f"{start} and {end}", value)
        return float(value)

    def _wrong_type(self, name: str, wanted: str) -> ApiError:
        value = self._values[name]
        came = repr(shown(value)) if self._texts and isinstance(value, str) else _kind(value)
        return ApiError(f"{name} must be {wanted}, got {came}.", param=name, code="invalid_type")


def parse_json(body: bytes) -> dict[str, Any]:
    """The flat object in a body; raises ApiError for everything that is not one."""
    try:
        fields = json.loads(body.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ApiError("The body must be a flat JSON object, it is nested too deeply.") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are kinds of it
        raise ApiError(f"The body must be valid JSON in UTF-8: {str(error)[:200]}.") from None
    if not isinstance(fields, dict):
        raise ApiError(f"The body must be a JSON object, got {_kind(fields)}.")
    return fields


def missing(name: str) -> ApiError:
    """The answer where a field must be there."""
    return ApiError(f"Missing required parameter: {name}.", param=name, code="missing_parameter")


def given_twice(name: str) -> ApiError:
    """The answer where one of two values would have to be ignored."""
    return ApiError(
        f"Parameter given twice: {shown(name)!r}.", param=shown(name), code="duplicate_parameter"
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise given_twice(name)
        fields[name] = value
    return fields


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _out_of_range(name: str, wanted: str, value: float) -> ApiError:
    return ApiError(
        f"{name} must be {wanted}, got {str(value)[:32]}.", param=name, code="out_of_range"
    )


def _kind(value: Any) -> str:
    """What JSON calls it."""
    if isinstance(value, bool):
        return "a boolean"
    names = {str: "a string", int: "an integer", float: "a number", list: "an array"}
    return {dict: "an object", type(None): "null"}.get(type(value)) or names[type(value)]
