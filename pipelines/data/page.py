"""Pages of our own: one file each, one style for all, and nothing a stranger wrote is markup.

Captions and URLs are hostile: all text is escaped, nothing is loaded from anywhere, no script runs,
and pictures are encoded anew into the page. The browser is told so as well (a content security
policy that knows the hash of our style sheet and nothing else).
"""

import base64
import hashlib
import io
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from pipelines.data.storage import replace_file

HERE = Path(__file__).parent
STYLE = "page.css"
MAX_TEXT = 300


def write_page(path: Path, template: Path, content: dict[str, Any]) -> None:
    """Fill a template that extends `page.html`; the page may replace an older one."""
    style = (HERE / STYLE).read_text()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, HERE]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template(template.name).render(
        content,
        style=Markup(style),  # noqa: S704  # our own file, of which the policy names the hash
        style_hash=f"sha256-{digest}",
    )
    replace_file(path, page.encode())


def inline_picture(pixels: np.ndarray | Image.Image, box: tuple[int, int], quality: int) -> str:
    """A data: URI of a copy that fits in a box (width, height)."""
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.thumbnail(box)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=quality)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def short(text: str) -> str:
    """A stranger's text at a length that a page can bear."""
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"
