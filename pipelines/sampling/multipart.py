"""A form as browsers and clients post it (multipart/form-data, RFC 7578), from bytes in memory.

Strict: what this does not understand is refused, because a field that is skipped would be a field
that is ignored.
"""

import re
from dataclasses import dataclass

from pipelines.sampling.openai_errors import ApiError, shown

MOST_PARTS = 64
HEADER_BYTES = 4096
BOUNDARY = re.compile(r'boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))', re.IGNORECASE)
# A quoted string whose quotes are %22 (the HTML standard) or \" (older clients).
NAME = re.compile(r';\s*name="((?:[^"\\]|\\.)*)"', re.IGNORECASE)
FILE = re.compile(r";\s*filename\*?=", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """A field of a form."""

    name: str
    data: bytes
    is_file: bool

    def text(self) -> str:
        """What it says; raises ApiError for a file and for bytes that are not UTF-8."""
        try:
            if self.is_file:
                raise ValueError("it is a file")
            return self.data.decode()
        except ValueError as error:
            raise ApiError(
                f"{shown(self.name)} must be a text in UTF-8, but {str(error)[:100]}.",
                param=shown(self.name),
                code="invalid_type",
            ) from None


def parse_multipart(content_type: str, body: bytes) -> list[Part]:
    """The parts of a form in their order; raises ApiError for a body that is not one."""
    found = BOUNDARY.search(content_type)
    if not found:
        raise ApiError("The header content-type must name the form's boundary.")
    boundary = b"--" + (found[1] or found[2]).encode("latin-1", errors="replace")
    # Every boundary but the first ends the line before it.
    first, *pieces = (b"\r\n" + body).split(b"\r\n" + boundary, MOST_PARTS + 2)
    if first.strip() or not pieces:
        raise _broken("it does not begin with its boundary")
    if len(pieces) > MOST_PARTS + 1:
        raise _broken(f"it has more than {MOST_PARTS} fields")
    *parts, last = pieces
    if not last.startswith(b"--") or last[2:].strip():
        raise _broken("it does not end with its last boundary")
    return [_part(piece) for piece in parts]


def _part(piece: bytes) -> Part:
    head, blank, data = piece.partition(b"\r\n\r\n")
    if not blank or not head.startswith(b"\r\n") or len(head) > HEADER_BYTES:
        raise _broken("a field has no header, or a very long one")
    try:
        lines = head.decode().split("\r\n")[1:]
    except UnicodeDecodeError:
        raise _broken("a field's header is not UTF-8") from None
    headers = {}
    for line in lines:
        key, colon, value = line.partition(":")
        if not colon:
            raise _broken("a line of a field's header has no colon")
        headers[key.strip().lower()] = value.strip()
    disposition = headers.get("content-disposition", "")
    name = NAME.search(disposition)
    if not disposition.lower().startswith("form-data") or not name:
        raise _broken("a field has no name")
    if headers.get("content-transfer-encoding", "binary").lower() not in ("binary", "8bit", "7bit"):
        raise _broken("a field is encoded, which RFC 7578 forbids")
    return Part(name=name[1], data=data, is_file=bool(FILE.search(disposition)))


def _broken(why: str) -> ApiError:
    return ApiError(f"The body must be a multipart/form-data form, but {why}.", code="invalid_form")
