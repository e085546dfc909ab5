"""Which network addresses a fetch may dial, and an aiohttp resolver and socket that see to it.

Every address that a name resolves to must be public, and the address that was checked is the one
that is dialled: a name that is rebound between check and use changes nothing.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Collection

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[list[str]]]
Check = Callable[[str, int], str | None]


class ForbiddenAddress(OSError):
    """A name led to an address that is not ours to ask; aiohttp expects OSError of resolvers."""


def forbidden(
    address: str, port: int, *, ports: Collection[int], allow_loopback: bool
) -> str | None:
    """Why this address and port must not be asked, None if they may."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "not an address"
    inner = [parsed, *_embedded(parsed)]
    if all(ip.is_loopback for ip in inner[-1:]):
        return None if allow_loopback else "loopback"
    if not all(_is_public(ip) for ip in inner):
        return "not a public address"
    return None if port in ports else f"port {port}"


class PublicResolver(AbstractResolver):
    """Resolves a name and refuses it if any of its addresses is not public."""

    def __init__(self, check: Check, resolve: Resolve) -> None:
        self._check, self._resolve = check, resolve

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        addresses = await self._resolve(host, port)
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "no address")
        for address in addresses:
            if why := self._check(address, port):
                raise ForbiddenAddress(why)
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        """Nothing is held."""


def checked_socket_factory(check: Check) -> Callable[[aiohttp.AddrInfoType], socket.socket]:
    """The last door: whatever way an address came, it is checked again when it is dialled."""

    def open_socket(info: aiohttp.AddrInfoType) -> socket.socket:
        family, kind, protocol, _, address = info
        if why := check(str(address[0]), int(address[1])):
            raise ForbiddenAddress(why)
        return socket.socket(family, kind, protocol)

    return open_socket


async def system_resolve(host: str, port: int) -> list[str]:
    """Every address that this machine's resolver knows for a name."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _embedded(address: Address) -> list[Address]:
    """The IPv4 address in a mapped, 6to4, Teredo or NAT64 one, which a router may unwrap."""
    if not isinstance(address, ipaddress.IPv6Address):
        return []
    if address.ipv4_mapped:
        return [address.ipv4_mapped]
    if address.sixtofour:
        return [address.sixtofour]
    if address.teredo:
        return [address.teredo[1]]
    if address in ipaddress.IPv6Network("64:ff9b::/96"):
        return [ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)]
    return []


def _is_public(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        return True  # judged by the address inside
    return address.is_global and not (address.is_multicast or address.is_reserved)
