"""OpenAI's error envelope."""

import math
from collections.abc import Mapping
from typing import Any

REQUEST_ERROR = "invalid_request_error"
SERVER_ERROR = "server_error"
RATE_ERROR = "rate_limit_error"
# The official client repeats every 5xx twice by itself; what failed so would fail again.
NO_RETRY = {"x-should-retry": "false"}


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
        """The answer's JSON."""
        fields = ("message", "type", "param", "code")
        return {"error": {name: getattr(self, name) for name in fields}}


def try_later(message: str, code: str, seconds: float) -> ApiError:
    """429, and when to come back; whole seconds, at least one."""
    return ApiError(
        message,
        status=429,
        type=RATE_ERROR,
        code=code,
        headers={"retry-after": str(max(1, math.ceil(seconds)))},
    )


def shown(text: str) -> str:
    """The start of a text that came in, fit for an answer: half a surrogate pair is not."""
    return text[:64].encode(errors="backslashreplace").decode()
