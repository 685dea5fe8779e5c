"""The result of one check of `pumice doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    says: one line for people. level: ok; note (nothing fails); problem (something will fail). remedy: what to
    do. value: the result for programs.
    """

    name: str
    says: str
    level: Level = "ok"
    remedy: str = ""
    value: Any = None


def format_size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def format_count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
