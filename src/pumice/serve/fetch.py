"""Pictures from the web, from public addresses alone.

A name is resolved once per hop and the connection goes to the very address that was checked, so that a name
which changes its mind between check and connection (DNS rebinding) gains nothing. The certificate and the
Host header stay those of the name. Redirects are followed by hand, each as a new address.
Knows HTTP and addresses. Does not know pictures.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import httpx

from pumice.serve.errors import ApiError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[list[str]]]

MAX_REDIRECTS = 3
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052


def is_public(address: Address) -> bool:
    """Whether an address belongs to the open internet, and every IPv4 address hidden in it does, too."""
    inner = _embedded(address)
    if inner is not None and not is_public(inner):
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return True  # what is mapped was checked
    never = address.is_multicast or address.is_reserved or address.is_unspecified or address.is_link_local
    if isinstance(address, ipaddress.IPv6Address) and address.is_site_local:
        return False
    return address.is_global and not address.is_private and not address.is_loopback and not never


def _embedded(address: Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address inside a mapped, NAT64, 6to4 or Teredo address."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a name, by the system's resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class Fetcher:
    """Fetches what a URL names, within a size (bytes) and a time (seconds, of everything together)."""

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
        # No proxy of the environment: it would connect wherever it likes.
        self._client = httpx.AsyncClient(trust_env=False, follow_redirects=False, verify=verify)

    async def close(self) -> None:
        await self._client.aclose()

    async def get(self, url: str, param: str) -> bytes:
        """The bytes behind a URL. Raises ApiError, 400, that names `param`."""

        def refuse(why: str) -> ApiError:
            return ApiError(400, f"the picture {_short(url)} {why}", param=param, code="invalid_image_url")

        try:
            with anyio.fail_after(self._seconds):
                return await self._follow(url, refuse)
        except TimeoutError:
            raise refuse(f"did not arrive within {self._seconds:g} s; send it as a data URI") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            raise refuse(f"cannot be fetched ({type(error).__name__}); send it as a data URI") from error

    async def _follow(self, url: str, refuse: Callable[[str], ApiError]) -> bytes:
        target = httpx.URL(url)
        for _ in range(MAX_REDIRECTS + 1):
            if target.scheme not in ("http", "https") or not target.host:
                raise refuse("is no http(s) address")
            if target.userinfo:
                raise refuse("holds a user name; leave it out")
            async with self._client.stream(
                "GET",
                target.copy_with(host=await self._address(target, refuse)),
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
                    raise refuse(f"answered with status {response.status_code}; send it as a data URI")
                data = bytearray()
                async for chunk in response.aiter_raw():  # raw: nothing is decompressed
                    data += chunk
                    if len(data) > self._size:
                        raise refuse(f"is larger than {self._size} bytes; send a smaller one")
                return bytes(data)
        raise refuse(f"redirects more than {MAX_REDIRECTS} times")

    async def _address(self, target: httpx.URL, refuse: Callable[[str], ApiError]) -> str:
        port = target.port or (443 if target.scheme == "https" else 80)
        found = await self._resolve(target.raw_host.decode("ascii").strip("[]"), port)
        if not found:
            raise refuse("has a host without an address")
        for text in found:  # a name with one private address among public ones is refused as a whole
            if not self._permitted(ipaddress.ip_address(text.partition("%")[0])):
                raise refuse("is not on the public internet; send it as a data URI")
        return found[0]


def _short(url: str) -> str:
    return repr(url if len(url) <= 80 else f"{url[:77]}...")
