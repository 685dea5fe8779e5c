"""A pretend hub: it serves folders as repositories, and keeps what was asked of it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c" * 40
WEIGHTS = (".safetensors", ".bin", ".gguf")
BLOCK = 1 << 10  # bytes that the client reads at a time


class Hub:
    """A server with repositories, which are folders, and a list of what was asked: a file, how many bytes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sent: list[tuple[str, int]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                if api := re.fullmatch(r"/api/models/(\w+/\w+)(/(?:revision|tree)/\w+)?(\?.*)?", self.path):
                    return self.reply(*hub.describe(api[1], "/tree/" in (api[2] or "")))
                repository, _, name = re.sub(r"/resolve/\w+/", "\n", self.path[1:]).partition("\n")
                file = hub.root / repository / name
                if not file.is_file():
                    return self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})
                whole = file.read_bytes()
                digest = hashlib.sha256(whole).hexdigest()
                headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(whole))}
                if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                    start, end = int(asked[1]), int(asked[2] or len(whole) - 1)
                    part = whole[start : end + 1]
                    headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(whole)}"
                    return self.reply(206, part, headers, f"{repository}/{name}")
                return self.reply(200, whole, headers, f"{repository}/{name}")

            def reply(self, status: int, body: bytes, headers: dict[str, str], file: str = "") -> None:
                size = len(body) if self.command == "GET" else 0
                hub.sent.append((file, size))
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(body[:size])

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def describe(self, name: str, tree: bool) -> tuple[int, bytes, dict[str, str]]:
        if not (self.root / name).is_dir():
            return 404, b"{}", {"X-Error-Code": "RepoNotFound"}
        files = [path for path in sorted((self.root / name).iterdir()) if path.is_file()]
        listed = [
            {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40}
            for path in files
        ]
        siblings = [{"rfilename": path.name} for path in files]
        answer: Any = listed if tree else {"id": name, "sha": COMMIT, "siblings": siblings}
        return 200, json.dumps(answer).encode(), {"Content-Type": "application/json"}

    def add(self, name: str, folder: Path) -> Path:
        return Path(shutil.copytree(folder, self.root / name))

    def weight_bytes(self, name: str = "") -> int:
        """The bytes of weights that were sent."""
        return sum(size for file, size in self.sent if file.startswith(name) and file.endswith(WEIGHTS))
