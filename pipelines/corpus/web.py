"""A small piece of the web on loopback: the shipped corpus, and the bad rows that any list has."""

import io
import sys
import threading
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

HOST = "127.0.0.1"
CORPUS = "fluent_emoji.parquet"
BAD_ROWS_WITH_PICTURES = 3
TRUNCATED_SHARE = 0.6
BANNER = (1200, 100)
HTML = b"<!doctype html><title>Sorry</title><p>This picture has moved. <a href='/'>Home</a>"


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row as the web has it, and the reason for which the data stages drop it."""

    name: str
    url: str
    caption: str
    reason: str


class CorpusWeb:
    """Serves ``/emoji/HEX.webp`` in threads while the context is open."""

    def __init__(self, port: int, pictures: int) -> None:
        """Take the first `pictures` of the corpus' own order; port 0 takes any free one.

        Raises ValueError if the port is taken or the corpus has fewer pictures.
        """
        rows = sorted(_corpus().to_pylist(), key=lambda row: row["rank"])
        most = len(rows) - BAD_ROWS_WITH_PICTURES
        if not 1 <= pictures <= most:
            raise ValueError(f"pictures must be in 1..{most}, got {pictures}")
        self.rows = rows[:pictures]
        self._spare = rows[pictures : pictures + BAD_ROWS_WITH_PICTURES]
        pages = _pages(self.rows, self._spare)
        try:
            self._server = _Server((HOST, port), partial(_Handler, pages))
        except OSError as error:
            raise ValueError(
                f"the port must be free, but {HOST}:{port} is not ({error.strerror}): take another"
            ) from error
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> "CorpusWeb":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def bad_rows(self) -> list[BadRow]:
        """One of each: what comes with every list that people gather."""
        german, dated, _ = (self._url(f"emoji/{row['key']}.webp") for row in self._spare)
        first = self.rows[0]
        copy = self._url(f"copy/{first['key']}.webp")
        repeated = self._url(f"emoji/{first['key']}.webp"), first["caption"]
        found = [
            ("not_found", self._url("emoji/none.webp"), "a picture of nothing", "http_404"),
            ("truncated", self._url("bad/truncated.jpg"), "a picture cut off", "broken_picture"),
            ("html", self._url("bad/page.jpg"), "a picture that is a page", "not_a_picture"),
            ("banner", self._url("bad/banner.png"), "a banner for a sale", "aspect_ratio"),
            ("german", german, "ein Bild von einem Ding auf weißem Grund", "not_english"),
            ("dated", dated, "photographed on 12 May 2009", "boilerplate"),
            ("copy", copy, first["caption"], "duplicate_picture"),
            ("repeated", *repeated, "duplicate_pair"),
            ("file", "file:///etc/passwd", "a list of users", "forbidden_scheme"),
        ]
        return [
            BadRow(name=name, url=url, caption=caption, reason=reason)
            for name, url, caption, reason in found
        ]

    def url_list(self, path: Path) -> Path:
        """Write the list of pictures and bad rows; a function of port and number of pictures."""
        good = [(self._url(f"emoji/{row['key']}.webp"), row["caption"]) for row in self.rows]
        bad = [(row.url, row.caption) for row in self.bad_rows]
        urls, captions = zip(*good, *bad, strict=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"url": list(urls), "caption": list(captions)}), path)
        return path

    def _url(self, page: str) -> str:
        return f"http://{HOST}:{self.port}/{page}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # the standard five refuse a fetcher that opens sixteen at once

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that closes first is no error; anything else is shown as the standard does."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, pages: dict[str, tuple[str, bytes]], *args: object) -> None:
        self._pages = pages
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        kind, body = self._pages.get(self.path, ("text/plain", b"no such picture\n"))
        self.send_response(200 if self.path in self._pages else 404)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Silent: the report of the download says what was asked."""


def _pages(rows: list[dict], spare: list[dict]) -> dict[str, tuple[str, bytes]]:
    pages = {f"/emoji/{row['key']}.webp": ("image/webp", row["image"]) for row in rows + spare}
    pages[f"/copy/{rows[0]['key']}.webp"] = ("image/webp", rows[0]["image"])
    whole = _encode(Image.open(io.BytesIO(spare[-1]["image"])).convert("RGB"), "JPEG")
    pages["/bad/truncated.jpg"] = ("image/jpeg", whole[: int(len(whole) * TRUNCATED_SHARE)])
    pages["/bad/page.jpg"] = ("image/jpeg", HTML)
    pages["/bad/banner.png"] = ("image/png", _encode(Image.new("RGB", BANNER, "crimson"), "PNG"))
    return pages


def _encode(image: Image.Image, encoding: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, encoding)
    return buffer.getvalue()


def _corpus() -> pa.Table:
    with resources.as_file(resources.files("pipelines.corpus") / CORPUS) as path:
        return pq.read_table(path)
