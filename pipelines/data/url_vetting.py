"""What can be refused of a URL or of an answer's headers before anything is asked or read."""

import ipaddress
from collections.abc import Callable, Sequence

from yarl import URL

AGENT = "manray"
# What img2dataset honours too: the owner does not want the picture used for training or indexed.
OPT_OUT = frozenset({"noai", "noimageai", "noindex", "noimageindex"})
MAX_URL_LENGTH = 2083


class Refused(Exception):
    """One URL is given up; carries what goes into its row."""

    def __init__(self, reason: str, detail: str = "", *, retry_after_s: float = 0.0) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail, self.retry_after_s = reason, detail, retry_after_s


def parse_url(text: str, base: URL | None = None) -> URL:
    """A URL as aiohttp will read it; a relative one is taken from `base`. Raises Refused."""
    if not text or len(text) > MAX_URL_LENGTH:
        raise Refused("bad_url", "empty" if not text else f"longer than {MAX_URL_LENGTH}")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        raise Refused("bad_url", "control characters")
    try:
        url = URL(text) if base is None else base.join(URL(text))
        url.port, url.host  # noqa: B018  # both are parsed only when asked for
    except (ValueError, UnicodeError) as error:
        raise Refused("bad_url", "cannot be parsed") from error
    return url


def vet_url(url: URL, check: Callable[[str, int], str | None]) -> str:
    """The host, if nothing speaks against the URL that can be seen without a name server.

    `check` is `addresses.forbidden` with its settings. Raises Refused.
    """
    if url.scheme not in ("http", "https"):
        raise Refused("forbidden_scheme", url.scheme or "none")
    if not url.host:
        raise Refused("bad_url", "no host")
    if url.user is not None or url.password is not None:
        raise Refused("bad_url", "credentials")
    try:
        ipaddress.ip_address(url.host.partition("%")[0])
    except ValueError:
        return url.host  # a name, or a form such as 127.1 that only the resolver reads
    if why := check(url.host, url.port or 0):
        raise Refused("forbidden_address", why)
    return url.host


def check_opt_out(headers: Sequence[str]) -> None:
    """X-Robots-Tag: "noai, nofollow", or "agent: noai" which is for that agent only."""
    for header in headers:
        directives = header.lower()
        agent, colon, rest = directives.partition(":")
        if colon and "," not in agent:
            if agent.strip() != AGENT:
                continue
            directives = rest
        found = OPT_OUT & {word.strip() for word in directives.split(",")}
        if found:
            raise Refused("opted_out", ", ".join(sorted(found)))
