"""The page at /: our own, in one piece, the same for everybody.

It holds no data: what it shows it asks of the API, and puts on the page as text and pictures.
Nothing is loaded from elsewhere, and the browser is told so (a content security policy that knows
the hashes of our style sheet and our script and nothing else).
"""

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Page:
    """A page and the headers that it is to be sent with."""

    content: bytes
    headers: dict[str, str]


def playground() -> Page:
    """The page, put together from its three files."""
    parts = {name: (HERE / f"playground.{name}").read_text() for name in ("html", "css", "js")}
    policy = "; ".join(
        [
            "default-src 'none'",
            "img-src data:",
            "connect-src 'self'",
            f"style-src '{_hash(parts['css'])}'",
            f"script-src '{_hash(parts['js'])}'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
    content = parts["html"].replace("/*style*/", parts["css"]).replace("/*script*/", parts["js"])
    return Page(
        content=content.encode(),
        headers={"content-security-policy": policy, "x-frame-options": "DENY"},
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
