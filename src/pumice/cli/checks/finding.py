"""What was found, with its remedy; and how sizes and files of the system are read. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

GB = 1e9
MEMORY = 1.5 * GB  # pumice-tiny answers in about 1 GB; some room beside it
DISK = 0.5 * GB  # its parts are 130 MB, held twice while they are unpacked


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    level: ok; note (worth knowing, nothing fails); problem (something will fail). remedy: what to do.
    value: the same as `says`, for programs.
    """

    name: str
    says: str
    level: Literal["ok", "note", "problem"] = "ok"
    remedy: str = ""
    value: Any = None


def lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def words(path: Path) -> list[str]:
    return " ".join(lines(path)).split()


def existing(path: Path) -> Path:
    """The path itself, or the folder above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def weight(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def size(number: float) -> str:
    return f"{number / GB:.1f} GB" if number >= GB else f"{number / 1e6:.0f} MB"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
