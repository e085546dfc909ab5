"""Reading what a client sends, within bounds of type, size and time."""

import asyncio

from fastapi import Request

from pipelines.sampling.openai_errors import ApiError


async def read_body(request: Request, media_type: str, most_bytes: int, seconds: float) -> bytes:
    """The body; raises ApiError for another type, a packed or a large one, and for a slow client.

    A foreign web page can make a browser post forms and plain text unasked, but not JSON.
    """
    found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if found != media_type:
        raise ApiError(
            f"The header content-type must be {media_type}.",
            status=415,
            code="unsupported_media_type",
        )
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ApiError(
            "The body must be sent as it is, not packed: leave out content-encoding.",
            status=415,
            code="unsupported_content_encoding",
        )
    for name in request.query_params:
        raise ApiError(
            f"Unknown query parameter: {name[:64]!r}. Parameters are fields of the body.",
            param=name[:64],
            code="unknown_parameter",
        )
    try:
        async with asyncio.timeout(seconds):
            return await _read(request, most_bytes)
    except TimeoutError:
        raise ApiError(
            f"The body must arrive within {seconds:g} s.",
            status=408,
            code="body_too_slow",
            headers={"connection": "close", "x-should-retry": "false"},
        ) from None


async def _read(request: Request, most_bytes: int) -> bytes:
    """As far as it is not too large: a length that is announced may be a lie."""
    announced = request.headers.get("content-length", "0")
    too_large = ApiError(
        f"The body must be at most {most_bytes} bytes.", status=413, code="body_too_large"
    )
    if announced.isdecimal() and int(announced[:20]) > most_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most_bytes:
            raise too_large
    return bytes(body)
