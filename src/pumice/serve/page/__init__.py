"""The files of the chat page at /, which need no build step and load nothing from other servers."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).parent
EXPLAIN = FOLDER.parents[1] / "explain"  # its page.js and page.css show an explanation
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".jpg": "image/jpeg",
    ".webmanifest": "application/manifest+json",
}
# Everything comes from this server, except pictures: the user picks them (data:, blob:).
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; manifest-src 'self'; worker-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class PageFile:
    """One file of the page and its media type."""

    body: bytes
    media_type: str

    @property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self.body).hexdigest()[:16]}"'


def files() -> dict[str, PageFile]:
    """Return path -> file. The service worker is at the top, since it controls only paths below its own."""
    served = {}
    for path in sorted(FOLDER.rglob("*")):
        if path.suffix in MEDIA_TYPES and path.is_file():
            name = path.relative_to(FOLDER).as_posix()
            address = {"index.html": "/", "sw.js": "/sw.js"}.get(name, f"/page/{name}")
            served[address] = PageFile(path.read_bytes(), MEDIA_TYPES[path.suffix])
    for suffix in (".js", ".css"):
        served[f"/page/explain{suffix}"] = PageFile(
            EXPLAIN.joinpath(f"page{suffix}").read_bytes(), MEDIA_TYPES[suffix]
        )
    return served


def send(file: PageFile) -> Callable[[Request], Awaitable[Response]]:
    """Return the endpoint of a file. A browser whose copy is current gets 304."""
    headers = {"ETag": file.etag, "Cache-Control": "no-cache", "Content-Security-Policy": POLICY}

    async def endpoint(request: Request) -> Response:
        if request.headers.get("if-none-match") == file.etag:
            return Response(status_code=304, headers=headers)
        return Response(file.body, headers={**headers, "Content-Type": file.media_type})

    return endpoint
