"""The journal: every request before it is sent and every reply as it came, appended to one file.

A record is one line of JSON, and is on the disk (fsync) before anything depends on it:

    {"event": "prompt", "id": P, "messages": [...]}         what comes before the user's text; once each
    {"event": "sent", "id": R, "prompt": P, "user": ..., "image": ..., "reserved": [in, out]}
    {"event": "reply", "id": R, "raw": ..., "cost": [in, out]}
    {"event": "failed", "id": R, "why": ..., "status": ..., "raw": ..., "cost": [in, out]}

A "sent" that nothing follows was under way when its process died: its reservation counts as spent.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pumice.chat_client import Tokens
from pumice.errors import InputError
from pumice.files import sync
from pumice.images import image_key, read_image


@dataclass(frozen=True)
class TeacherRequest:
    """One question to a teacher.

    prompt: (role, text) before the user's. image: a file to show, or None; image_key: of its contents when
    the request was made, which `id` depends on.
    """

    id: str
    prompt: tuple[tuple[str, str], ...]
    user: str
    max_tokens: int
    image: str | None = None
    image_key: str | None = None

    def picture(self) -> bytes | None:
        """The file to show, read once. Raises InputError when it has changed since the request was made."""
        if self.image is None:
            return None
        data = read_image(self.image)
        if image_key(data) != self.image_key:
            raise InputError(f"picture {self.image!r} has changed since the run began; run the command again")
        return data

    @property
    def prompt_id(self) -> str:
        return digest(self.prompt)

    @property
    def size(self) -> int:
        """Bytes of its text: no tokenizer that falls back to bytes can make more tokens of it."""
        return sum(len(text.encode()) for _, text in self.prompt) + len(self.user.encode())


def digest(*values: Any) -> str:
    """32 hexadecimal digits that stand for the values."""
    return hashlib.blake2b(json.dumps(values, ensure_ascii=False).encode(), digest_size=16).hexdigest()


EVENTS = ("prompt", "sent", "reply", "failed")


@dataclass
class Tally:
    """What the journal adds up to."""

    sent: int = 0  # calls
    replies: int = 0
    failures: Counter[str] = field(default_factory=Counter)  # by cause
    tokens_in: int = 0  # spent, reservations of lost calls included
    tokens_out: int = 0
    lost: int = 0  # calls under way when their process died
    damaged: int = 0  # lines that a crash tore
    prompt_bytes: int = 0  # of the requests that were answered, to learn bytes per token
    replied_in: int = 0  # tokens of those
    replied_out: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "calls": self.sent - self.failures["unreachable"],
            "replies": self.replies,
            "failures": dict(sorted(self.failures.items())),
            "lost": self.lost,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
        }


class Journal:
    """A journal that is read once and then appended to. Only offsets stay in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tally = Tally()
        self.why: dict[str, str] = {}  # request -> its last failure, while it has no reply
        self._replies: dict[str, tuple[int, int]] = {}
        self._prompts: set[str] = set()
        self._open: dict[str, tuple[Tokens, int]] = {}  # sent, and not yet answered
        self._end = 0
        self._torn = False  # whether a crash cut the last record, so that the next one needs a new line
        self._file: IO[bytes] | None = None
        if path.exists():
            with path.open("rb") as file:
                for line in file:
                    self._torn = not line.endswith(b"\n")
                    if self._torn:
                        self.tally.damaged += bool(line.strip())
                    else:
                        self._take(line)
                    self._end += len(line)

    def _take(self, line: bytes) -> None:
        """Count a record. A line that is none counts as damaged."""
        try:
            record = json.loads(line)
            event, key, why = record["event"], str(record["id"]), str(record.get("why"))
            numbers = (0, 0) if event == "prompt" else record["reserved" if event == "sent" else "cost"]
            first, second = map(int, numbers)
            sent_bytes = int(record["bytes"]) if event == "sent" else 0
            if event not in EVENTS or (event == "reply" and "raw" not in record):
                raise ValueError(f"no record of {event!r}")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            self.tally.damaged += bool(line.strip())
            return
        tally = self.tally
        if event == "prompt":
            self._prompts.add(key)
            return
        if event == "sent":
            self._close(key)
            self._open[key] = ((first, second), sent_bytes)
            tally.sent += 1
            return
        _, size = self._open.pop(key, ((0, 0), 0))
        tally.tokens_in += first
        tally.tokens_out += second
        if event == "reply":
            tally.replies += 1
            tally.prompt_bytes += size
            tally.replied_in += first
            tally.replied_out += second
            self._replies[key] = (self._end, len(line))
            self.why.pop(key, None)
        else:
            tally.failures[why] += 1
            self.why[key] = why

    def _close(self, key: str) -> None:
        if key in self._open:
            (spent_in, spent_out), _ = self._open.pop(key)
            self.tally.tokens_in += spent_in
            self.tally.tokens_out += spent_out
            self.tally.lost += 1
            self.why[key] = "lost"

    def settle(self) -> list[str]:
        """Count calls without an outcome as lost, once nobody can be writing any more; their requests."""
        lost = list(self._open)
        for key in lost:
            self._close(key)
        return lost

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._replies

    def reply(self, request_id: str) -> str | None:
        """The raw reply to a request, or None."""
        if request_id not in self._replies:
            return None
        start, length = self._replies[request_id]
        with self.path.open("rb") as file:
            file.seek(start)
            return str(json.loads(file.read(length))["raw"])

    def sent(self, request: TeacherRequest, reserved: Tokens, model: str) -> list[dict[str, Any]]:
        """The records to append before a request is sent."""
        records: list[dict[str, Any]] = []
        if request.prompt_id not in self._prompts:
            self._prompts.add(request.prompt_id)
            records.append({"event": "prompt", "id": request.prompt_id, "messages": request.prompt})
        records.append(
            {
                "event": "sent", "id": request.id, "prompt": request.prompt_id, "user": request.user,
                "image": request.image, "model": model, "reserved": reserved, "bytes": request.size,
                "time": round(time.time(), 3),
            }
        )  # fmt: skip
        return records

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Write records and wait until they are on the disk."""
        self.write(records)
        self.sync()

    def write(self, records: Iterable[dict[str, Any]]) -> None:
        """Append records, which are safe only when `sync` has returned."""
        if self._file is None:
            self._file = self.path.open("ab")
            self._end += self._file.write(b"\n" * self._torn)
            self._torn = False
            sync(self.path.parent)
        for record in records:
            line = json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
            self._file.write(line)
            self._take(line)
            self._end += len(line)
        self._file.flush()

    def sync(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file until it is written to again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def reply(request_id: str, raw: str, cost: Tokens) -> dict[str, Any]:
    return {"event": "reply", "id": request_id, "raw": raw, "cost": cost, "time": round(time.time(), 3)}


def failed(request_id: str, why: str, status: int | None, raw: str, cost: Tokens) -> dict[str, Any]:
    return {
        "event": "failed", "id": request_id, "why": why, "status": status, "raw": raw[:2000], "cost": cost,
        "time": round(time.time(), 3),
    }  # fmt: skip
