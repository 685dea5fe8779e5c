"""Download pictures from the web, from public addresses only.

Each hop resolves the name once, checks its addresses and connects to a checked one. So a name whose address
changes after the check (DNS rebinding) has no effect. The Host header and the certificate are those of the
name. Every redirect is checked like a new URL.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import httpx

from pumice.errors import shorten
from pumice.serve.errors import ApiError, invalid

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[list[str]]]

MAX_REDIRECTS = 3
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052


def is_public(address: Address) -> bool:
    """Return whether an address, and any IPv4 address embedded in it, is on the public internet."""
    ipv4 = _embedded_ipv4(address)
    if ipv4 is not None and not is_public(ipv4):
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return True  # the embedded address is public
    special = address.is_multicast or address.is_reserved or address.is_unspecified or address.is_link_local
    if isinstance(address, ipaddress.IPv6Address) and address.is_site_local:
        return False
    return address.is_global and not address.is_private and not address.is_loopback and not special


def _embedded_ipv4(address: Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address inside a mapped, NAT64, 6to4 or Teredo address."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)


async def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a name from the resolver of the system."""
    entries = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in entries]


class Fetcher:
    """Downloads URLs. size: limit in bytes. seconds: limit for all hops together."""

    def __init__(
        self,
        *,
        size: int,
        seconds: float,
        permitted: Callable[[Address], bool] = is_public,
        resolve: Resolve = resolve,
        verify: Any = True,
    ) -> None:
        self._size, self._seconds = size, seconds
        self._permitted, self._resolve = permitted, resolve
        # No proxy from the environment: it would resolve the names itself, without the check.
        self._client = httpx.AsyncClient(trust_env=False, follow_redirects=False, verify=verify)

    async def close(self) -> None:
        await self._client.aclose()

    async def get(self, url: str, param: str, take: Callable[[int], None] = lambda _: None) -> bytes:
        """Return the bytes behind a URL. Raises ApiError, 400, that names the field `param`.

        take: is told how many bytes arrive, before they are kept.
        """

        def url_error(reason: str) -> ApiError:
            return invalid(param, f"the picture {shorten(url, 80)} {reason}", "invalid_image_url")

        try:
            with anyio.fail_after(self._seconds):
                return await self._follow(url, url_error, take)
        except TimeoutError:
            raise url_error(f"did not arrive within {self._seconds:g} s; send it as a data URI") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            raise url_error(f"cannot be fetched ({type(error).__name__}); send it as a data URI") from error

    async def _follow(
        self, url: str, url_error: Callable[[str], ApiError], take: Callable[[int], None]
    ) -> bytes:
        target = httpx.URL(url)
        for _ in range(MAX_REDIRECTS + 1):
            if target.scheme not in ("http", "https") or not target.host:
                raise url_error("is no http(s) address")
            if target.userinfo:
                raise url_error("holds a user name; leave it out")
            async with self._client.stream(
                "GET",
                target.copy_with(host=await self._checked_address(target, url_error)),
                headers={
                    "Host": target.netloc.decode("ascii"),
                    "Accept": "image/*",
                    "Accept-Encoding": "identity",
                    "Connection": "close",
                    "User-Agent": "pumice",
                },
                extensions={"sni_hostname": target.raw_host.decode("ascii")},
            ) as response:
                if response.is_redirect and "location" in response.headers:
                    target = target.join(response.headers["location"])
                    continue
                if response.status_code != 200:
                    raise url_error(f"answered with status {response.status_code}; send it as a data URI")
                data = bytearray()
                async for chunk in response.aiter_raw():  # raw: nothing is decompressed
                    take(len(chunk))
                    data += chunk
                    if len(data) > self._size:
                        raise url_error(f"is larger than {self._size} bytes; send a smaller one")
                return bytes(data)
        raise url_error(f"redirects more than {MAX_REDIRECTS} times")

    async def _checked_address(self, target: httpx.URL, url_error: Callable[[str], ApiError]) -> str:
        port = target.port or (443 if target.scheme == "https" else 80)
        addresses = await self._resolve(target.raw_host.decode("ascii").strip("[]"), port)
        if not addresses:
            raise url_error("has a host without an address")
        # One private address among public ones refuses the name: a retry could connect to it.
        for text in addresses:
            if not self._permitted(ipaddress.ip_address(text.partition("%")[0])):
                raise url_error("is not on the public internet; send it as a data URI")
        return addresses[0]
