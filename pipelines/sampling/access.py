"""Who may ask, how often, from where, and for what."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from starlette.datastructures import Headers

from pipelines.sampling.keys import KeyFile, UnreadableKeys
from pipelines.sampling.openai_errors import SERVER_ERROR, ApiError
from pipelines.sampling.policies import Policies, PolicySettings
from pipelines.sampling.rate_limits import LocalBudget, PictureBudget, RateLimits, TokenBuckets

ANYBODY = "anybody"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, kw_only=True)
class AccessSettings:
    """Settings of the door; the defaults are for loopback."""

    keys: Path | None = None
    """File of keys, made by jobs.serve_keys; without one nobody is asked for a key."""
    hosts: tuple[str, ...] = LOOPBACK_NAMES
    """Names under which requests may come (the Host header, without the port), so that no web page
    reaches a server on loopback under a name of its own (DNS rebinding). Empty: any."""
    rate: RateLimits = field(default_factory=RateLimits)
    policies: PolicySettings = field(default_factory=PolicySettings)
    body_seconds: float = 10.0
    """What a client may take to send its request."""
    keep_alive_seconds: float = 15.0
    """After so long without news a stream says that it is there, for whatever is in between."""
    access_log: bool = True
    """One line of JSON a request, in the logger manray.access."""
    log_prompts: bool = False
    """Whether it has the prompts."""

    def __post_init__(self) -> None:
        for name in ("body_seconds", "keep_alive_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


class Access:
    """The settings at work."""

    def __init__(self, settings: AccessSettings, budget: PictureBudget | None = None) -> None:
        """`budget` is shared by several apps; by default it is this one's own.

        Raises ValueError or OSError if the keys or a policy cannot be had.
        """
        self.settings = settings
        self.keys = None if settings.keys is None else KeyFile(settings.keys)
        self.budget = budget or LocalBudget(TokenBuckets(settings.rate))
        self.policies = Policies(settings.policies)
        self._hosts = {host.lower() for host in settings.hosts}

    def check_host(self, headers: Headers) -> None:
        """Refuse requests under a foreign name, and those that a foreign page made.

        A browser lets any page post a form anywhere, without asking; it only keeps the answer.
        """
        host = headers.get("host", "")
        if self._hosts and _name(host) not in self._hosts:
            raise ApiError(
                "The Host header must be a name under which this server is known: --access.hosts.",
                status=421,
                code="unknown_host",
            )
        origin = headers.get("origin")
        if origin is not None and not self._is_own(origin, host):
            raise ApiError(
                "Requests from pages of another origin are not answered.",
                status=403,
                code="foreign_origin",
            )

    def holder(self, headers: Headers) -> str:
        """Whose request it is; raises ApiError without a valid key, if there are keys."""
        if self.keys is None:
            return ANYBODY
        scheme, _, key = headers.get("authorization", "").partition(" ")
        try:
            holder = self.keys.holder(key.strip()) if scheme.lower() == "bearer" else None
        except UnreadableKeys:
            raise ApiError(
                "The keys cannot be checked just now.",
                status=503,
                type=SERVER_ERROR,
                code="keys_unreadable",
            ) from None
        if holder is None:
            raise ApiError(
                "A valid key is needed: Authorization: Bearer KEY.",
                status=401,
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return holder

    def _is_own(self, origin: str, host: str) -> bool:
        scheme, _, place = origin.partition("://")
        if scheme not in ("http", "https"):
            return False
        # A proxy in front may pass on another Host than the one that the page was loaded from.
        return place.lower() == host.lower() or _name(place) in self._hosts - set(LOOPBACK_NAMES)


def check_exposure(host: str, access: AccessSettings, *, allow_without_keys: bool) -> None:
    """Refuse to be reached by others without keys, unless told to."""
    if access.keys is None and not allow_without_keys and not is_loopback(host):
        raise ValueError(
            f"access.keys must be set to listen on {host}, where others reach the server: make a "
            "file with python -m jobs.serve_keys, or say --allow-without-keys"
        )


def hosts_for(host: str, hosts: Sequence[str]) -> tuple[str, ...]:
    """The names to accept: what is set, but any where others reach the server by names we do not
    know."""
    if is_loopback(host) or tuple(hosts) != LOOPBACK_NAMES:
        return tuple(hosts)
    return ()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _name(host: str) -> str:
    """Without the port."""
    name = host.lower()
    if name.startswith("["):
        return name.partition("]")[0] + "]"
    return name.partition(":")[0]
