"""The result of one check, and helpers that read system files and format sizes; standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

GB = 1e9
MEMORY = 1.5 * GB  # bytes; pumice-tiny needs about 1 GB
DISK = 0.5 * GB  # bytes; the parts of pumice-tiny are 130 MB, twice that while they are unpacked


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    says: one line for people. level: ok; note (nothing fails); problem (something will fail). remedy: what to
    do. value: the result for programs.
    """

    name: str
    says: str
    level: Literal["ok", "note", "problem"] = "ok"
    remedy: str = ""
    value: Any = None


def lines(path: Path) -> list[str]:
    """Return the lines of a file, or [] if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def words(path: Path) -> list[str]:
    """Return the words of a file, or [] if it cannot be read."""
    return " ".join(lines(path)).split()


def existing_folder(path: Path) -> Path:
    """Return the path itself if it exists, or the nearest folder above it that does."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def dir_size(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def format_size(size: float) -> str:
    return f"{size / GB:.1f} GB" if size >= GB else f"{size / 1e6:.0f} MB"


def format_count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
