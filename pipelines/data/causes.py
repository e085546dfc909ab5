"""Why fetches fail, by the names that people use, and which causes may pass by themselves."""

import re
from collections.abc import Collection
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

# Names for `--retry-failed`, each a pattern of drop reasons.
CAUSES = {
    "dns": r"unknown_host|dns_failed",
    "timeout": r"timeout",
    "connection": r"connection_failed",
    "tls": r"tls_failed",
    "429": r"http_429",
    "4xx": r"http_4\d\d",
    "5xx": r"http_5\d\d",
}
# What a dead resolver or a cut cable looks like from here.
NETWORK = ("dns", "timeout", "connection")
# What img2dataset says (its urllib's words, more exactly), and what it is called here.
SAID = {
    r"timed out": "timeout",
    r"name resolution": "dns_failed",
    r"name or service not known|no address associated|getaddrinfo": "unknown_host",
    r"x-robots-tag|disallowed": "opted_out",
    r"unknown url type|no host given": "bad_url",
    r"certificate|ssl": "tls_failed",
    r"connection|refused|reset|remote end closed": "connection_failed",
}
# A name that does not exist, a bad certificate or a 404 stay so for the next seconds.
PASSING = re.compile(
    r"timeout|dns_failed|connection_failed|http_(408|425|429|500|502|503|504|52\d|530)"
)


def parse_causes(text: str) -> tuple[str, ...]:
    """The sorted names in "dns,timeout,5xx"; `http_404` and its like are names too.

    Raises ValueError with the names that there are.
    """
    names = sorted({name.strip() for name in text.split(",") if name.strip()})
    for name in names:
        if name not in CAUSES and not re.fullmatch(r"http_\d{3}", name):
            raise ValueError(
                f"retry_failed must name causes among {', '.join(CAUSES)} "
                f"or a status such as http_404, got {name!r}"
            )
    if not names:
        raise ValueError(f"retry_failed must name at least one of {', '.join(CAUSES)}")
    return tuple(names)


def has_cause(reason: str, causes: Collection[str]) -> bool:
    """Whether a drop reason belongs to one of the named causes."""
    return any(re.fullmatch(CAUSES.get(name, re.escape(name)), reason) for name in causes)


def reason_said(message: str) -> str:
    """The drop reason in one of img2dataset's error messages."""
    if status := re.search(r"http error (\d{3})", message, re.IGNORECASE):
        return f"http_{status[1]}"
    found = (name for words, name in SAID.items() if re.search(words, message, re.IGNORECASE))
    return next(found, "download_failed")


def may_pass(reason: str) -> bool:
    """Whether the same URL is worth another try within seconds."""
    return PASSING.fullmatch(reason) is not None


def retry_after_seconds(header: str) -> float:
    """What a 429 or 503 asks for: seconds or a date (RFC 9110, 10.2.3); 0 if it says neither."""
    if re.fullmatch(r"\d{1,9}", header.strip()):
        return float(header)
    try:
        date = parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    zoned = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (zoned - datetime.now(UTC)).total_seconds())
