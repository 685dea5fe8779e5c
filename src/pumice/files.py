"""Write files completely or not at all, and lock files for one process at a time."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TextIO

from pumice.errors import InputError


def cache_folder() -> Path:
    """Return $PUMICE_CACHE, or `pumice` in the platform's cache folder. It need not exist yet."""
    if chosen := os.environ.get("PUMICE_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "pumice" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "pumice"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pumice"


def nearest(path: Path) -> Path | None:
    """Return the path, or the nearest of its parents that exists; None on a drive that does not."""
    return next((place for place in (path, *path.parents) if place.exists()), None)


def folder_size(folder: Path) -> int:
    """Return the bytes of all files in a folder; 0 if there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def make_readable(path: Path) -> None:
    """Give a file the mode that a plain `open` would have given it; temporary files are private."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def sync(path: Path) -> None:
    """Flush a file's contents, or a folder's names, to the disk, so that they survive a power cut."""
    if path.is_dir():
        if sys.platform == "win32":  # it cannot sync folders
            return
        handle = os.open(path, os.O_RDONLY)
    else:
        handle = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))  # Windows syncs only writable files
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Open a UTF-8 text file that replaces `path` when the block ends. An error leaves `path` unchanged.

    Write bytes to its `buffer`.
    """
    import tempfile  # here, as hashlib in `sha256`: every command imports this module

    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    partial = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace", newline="\n") as file:
            yield file
        make_readable(partial)
        sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's contents, in hexadecimal digits."""
    import hashlib

    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def whole_lines(path: Path) -> list[str]:
    """Return the complete lines of a UTF-8 file. A last line that a crash left incomplete is left out."""
    return path.read_bytes().decode("utf-8", errors="replace").split("\n")[:-1]


def appending(path: Path) -> IO[str]:
    """Open a UTF-8 file to append lines. A last line that a crash left incomplete is removed."""
    file = path.open("a+b")
    file.seek(0)
    complete_size = file.read().rfind(b"\n") + 1
    file.truncate(complete_size)
    return io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="\n")


class Lock:
    """A file that one process at a time holds; the system releases it when the process ends."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")

    def acquire(self) -> bool:
        """Try to take the lock. Return whether this process now holds it."""
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(self._file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def release(self) -> None:
        self._file.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def hold(path: Path, use: str) -> Lock:
    """Lock a file. Raise InputError if another process holds it. use: what that one does, in words."""
    lock = Lock(path)
    if not lock.acquire():
        lock.release()
        raise InputError(f"another run is {use}; wait for it, or name another")
    return lock
