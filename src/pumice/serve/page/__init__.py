"""The files of the chat page at /, which need no build step and load nothing from other servers."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
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


def files() -> dict[str, Path]:
    """Return path -> file. The service worker is at the top, since it controls only paths below its own."""
    names = {path.relative_to(FOLDER).as_posix(): path for path in sorted(FOLDER.rglob("*"))}
    names |= {f"explain{suffix}": EXPLAIN / f"page{suffix}" for suffix in (".js", ".css")}
    top = {"index.html": "/", "sw.js": "/sw.js"}
    return {
        top.get(name, f"/page/{name}"): path for name, path in names.items() if path.suffix in MEDIA_TYPES
    }


def send(file: Path) -> Callable[[Request], Awaitable[Response]]:
    """Return the endpoint of a file, which is read now. A browser whose copy is current gets 304."""
    body = file.read_bytes()
    etag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
    headers = {"ETag": etag, "Cache-Control": "no-cache", "Content-Security-Policy": POLICY}

    async def endpoint(request: Request) -> Response:
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
        return Response(body, headers={**headers, "Content-Type": MEDIA_TYPES[file.suffix]})

    return endpoint
