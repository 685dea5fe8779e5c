"""The settings of a server, checked before anything is loaded; imports the standard library only."""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass

from pumice.errors import InputError

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class ServerSettings:
    """Addresses, keys and limits of one server."""

    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()  # any one opens /v1, /explain and /metrics; () leaves them open
    cors: tuple[str, ...] = ()  # origins whose pages may send requests, "*" for all
    hosts: tuple[str, ...] = ()  # further host names that a server on a loopback address accepts

    max_body: int = 20 * MEBIBYTE  # bytes of a request
    max_images: int = 16  # pictures in a request
    max_pixels: int = 50_000_000  # of one picture, according to its header
    max_tokens: int = 2048  # of one answer
    default_tokens: int = 512  # of an answer whose request sets no limit
    queue: int = 64  # requests that wait for a slot; further ones get 429
    max_connections: int = 1024

    timeout: float = 300.0  # seconds from a request's arrival to the end of its answer
    body_timeout: float = 30.0  # seconds for a request's headers, and again for its body
    drain_timeout: float = 60.0  # seconds that answers in flight may take after SIGTERM

    allow_image_urls: bool = False  # fetch http(s) pictures, from public addresses only
    image_timeout: float = 10.0  # seconds for one of them, redirects included

    def check(self) -> ServerSettings:
        """Return the settings. Raises InputError for the first wrong value."""
        if not 0 <= self.port < 65536:
            raise InputError(f"the port is {self.port}; give 1 to 65535, or 0 for a free one")
        positive_integers = (
            "max_body",
            "max_images",
            "max_pixels",
            "max_tokens",
            "default_tokens",
            "max_connections",
        )
        for name in positive_integers:
            _above_zero(name, getattr(self, name))
        for name in ("timeout", "body_timeout", "drain_timeout", "image_timeout"):
            _above_zero(name, getattr(self, name))
        if self.queue < 0:
            raise InputError(f"queue is {self.queue}; give 0 or more")
        if self.default_tokens > self.max_tokens:
            raise InputError(
                f"default_tokens is {self.default_tokens}, above max_tokens, {self.max_tokens}; lower it"
            )
        for key in self.keys:
            if len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key:
                raise InputError(
                    "an API key is too short or holds blanks or characters outside ASCII; "
                    "make one with: openssl rand -hex 24"
                )
        for origin in self.cors:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise InputError(f"the CORS origin {origin!r} is not valid; write https://HOST or '*'")
        return self

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def _above_zero(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{name} is {value}; give more than 0")
