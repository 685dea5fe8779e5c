"""The settings of a server, which are the options of `pumice serve`, checked before anything is loaded."""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Option

from pumice.errors import InputError, check_known

KEYS = "PUMICE_API_KEY"  # environment variable: one key, or several separated by commas
SIZE_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


@dataclass(frozen=True)
class ServerSettings:
    """Addresses, keys, limits and log of one server, and the sizes of its engine."""

    host: Annotated[str, Option(help="The address to listen on; 0.0.0.0 for all.")] = "127.0.0.1"
    port: Annotated[int, Option("--port", "-p", help="0 takes a free one.")] = 8000
    name: Annotated[
        tuple[str, ...],
        Option(help="What clients call the model; repeat for further names."),
    ] = ()
    slots: Annotated[int, Option(min=1, help="Requests answered at a time.")] = 16
    queue: Annotated[int, Option(min=0, help="Requests that may wait beyond them.")] = 64
    cache_tokens: Annotated[
        int | None,
        Option(min=1, help="Tokens that the KV cache holds; by default in half of the free memory."),
    ] = None
    chunk: Annotated[
        int | None,
        Option(min=1, help="Tokens of prompts in one step; 640, on CUDA 2048."),
    ] = None
    api_key: Annotated[
        tuple[str, ...],
        Option(help=f"A key that clients must send; repeat for more. Also ${KEYS}."),
    ] = ()  # any one opens /v1, /api, /explain, /boxes and /metrics
    api_key_file: Annotated[Path | None, Option(help="A file with one key per line.")] = None
    cors: Annotated[
        tuple[str, ...],
        Option(help="An origin whose pages may ask, https://HOST or '*'; repeat."),
    ] = ()
    allow_host: Annotated[
        tuple[str, ...],
        Option(help="A further host name that a server on 127.0.0.1 answers to."),
    ] = ()
    allow_image_urls: Annotated[
        bool, Option("--allow-image-urls", help="Fetch http(s) pictures from public addresses.")
    ] = False
    max_tokens: Annotated[
        int | None,
        Option(help="The longest answer a request gets; all that fits if not given."),
    ] = None
    default_tokens: Annotated[int, Option(help="The longest answer of a request that names no limit.")] = 512
    max_body: Annotated[str, Option(help="Size of a request: bytes, or with K, M, G.")] = "20M"
    max_images: Annotated[int, Option(help="Pictures in one request.")] = 16
    max_pixels: Annotated[int, Option(help="Pixels of one picture.")] = 50_000_000  # according to its header
    max_connections: Annotated[int, Option(help="Open connections.")] = 1024
    timeout: Annotated[float, Option(help="Seconds from a request to its answer's end.")] = 300.0
    body_timeout: Annotated[float, Option(help="Seconds for a request to arrive.")] = 30.0
    image_timeout: Annotated[float, Option(help="Seconds to fetch a picture.")] = 10.0
    drain_timeout: Annotated[float, Option(help="Seconds that answers in flight may take after SIGTERM.")] = (
        60.0
    )
    log: Annotated[str, Option(help="json, text, or auto: text on a terminal.", metavar="FORM")] = "auto"
    log_level: Annotated[str, Option(help="debug, info, warning or error.")] = "info"

    def check(self) -> ServerSettings:
        """Return the settings. Raises InputError for the first wrong value."""
        if not 0 <= self.port < 65536:
            raise InputError(f"the port is {self.port}; give 1 to 65535, or 0 for a free one")
        limits = ("max_body", "max_tokens", "max_images", "max_pixels", "default_tokens", "max_connections",
                  "timeout", "body_timeout", "drain_timeout", "image_timeout")  # fmt: skip
        for name in limits:
            value = self.body_bytes if name == "max_body" else getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} is {value}; give more than 0")
        if self.queue < 0:
            raise InputError(f"queue is {self.queue}; give 0 or more")
        for key in self.api_key:
            if len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key:
                raise InputError(
                    "an API key has fewer than 8 characters, or blanks, or characters outside ASCII; "
                    "make one with: openssl rand -hex 24"
                )
        for origin in self.cors:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise InputError(f"the CORS origin {origin!r} is not valid; write https://HOST or '*'")
        check_known(self.log, ("json", "text", "auto"), f"--log is {self.log!r}")
        levels = ("debug", "info", "warning", "error")
        check_known(self.log_level, levels, f"--log-level is {self.log_level!r}")
        return self

    @property
    def body_bytes(self) -> int:
        """The size of a request, `max_body`, in bytes."""
        match = re.fullmatch(r"(\d+)\s*([kmg]?)i?b?", self.max_body.strip().lower())
        if match is None:
            raise InputError(f"the size {self.max_body!r} is not valid; write for example 20M")
        return int(match[1]) * SIZE_UNITS[match[2]]

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host == "localhost" or is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Return whether a host is an address of this machine alone; a name is none."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
