"""One run at a time in a folder. Knows the operating system's file locks, which end with the process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import IO

from pumice.errors import InputError


def hold(folder: Path, what: str) -> IO[str]:
    """Keep `folder` for this process while the returned file is open. InputError when another has it."""
    file = (folder / ".lock").open("a")
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise InputError(f"another run is using the {what} {folder}; wait for it, or name another") from error
    return file
