"""The page at /: its files, sent as they are. They need no build step and nothing from elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).parent
EXPLAIN = FOLDER.parents[1] / "explain"  # what shows an explanation, there and here
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".jpg": "image/jpeg",
    ".webmanifest": "application/manifest+json",
}
# Everything comes from this server; pictures also from the person who chose them.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; manifest-src 'self'; worker-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class File:
    body: bytes
    kind: str

    @property
    def tag(self) -> str:
        return f'"{hashlib.sha256(self.body).hexdigest()[:16]}"'


def files() -> dict[str, File]:
    """Address -> file. The service worker stands at the top, since it sees only what lies below it."""
    found = {}
    for path in sorted(FOLDER.rglob("*")):
        if path.suffix in KINDS and path.is_file():
            name = path.relative_to(FOLDER).as_posix()
            address = {"index.html": "/", "sw.js": "/sw.js"}.get(name, f"/page/{name}")
            found[address] = File(path.read_bytes(), KINDS[path.suffix])
    for suffix in (".js", ".css"):
        found[f"/page/explain{suffix}"] = File(EXPLAIN.joinpath(f"page{suffix}").read_bytes(), KINDS[suffix])
    return found


def send(file: File) -> Callable[[Request], Awaitable[Response]]:
    headers = {"ETag": file.tag, "Cache-Control": "no-cache", "Content-Security-Policy": POLICY}

    async def endpoint(request: Request) -> Response:
        if request.headers.get("if-none-match") == file.tag:
            return Response(status_code=304, headers=headers)
        return Response(file.body, headers={**headers, "Content-Type": file.kind})

    return endpoint
