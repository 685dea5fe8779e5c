"""The compiled code of the C files here: loaded from the cache folder, or made now and kept there.

It is compiled once per machine, when an engine with weights that it takes first opens on a CPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pumice.files import cache_folder, sync
from pumice.kernels.compiler import FLAGS, TRIED, compile_library, processor

Weights = Literal["packed", "fp32"]

# C files, and what is defined for them. "plain" is what the kernels of processors are compared with.
_LIBRARIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "packed": (("decode.c", "linear.c", "quantize.c"), ()),
    "plain": (("decode.c", "linear.c", "quantize.c"), ("-DPUMICE_PLAIN",)),
    "fp32": (("decode.c",), ("-DDENSE",)),
}
_LOG = logging.getLogger("pumice")


@lru_cache(maxsize=3)
def compiled(weights: Weights | Literal["plain"] = "packed") -> tuple[ctypes.CDLL | None, str]:
    """The compiled code, from the cache folder or made now; or None and why there is none."""
    if os.environ.get("PUMICE_NATIVE", "").lower() in ("off", "0"):
        return None, "PUMICE_NATIVE turns it off"
    if sys.platform == "win32":
        return None, "it is not made on Windows"
    named = shlex.split(os.environ.get("CC", ""))
    found = next(filter(None, map(shutil.which, named[:1] or ("cc", "gcc", "clang"))), None)
    if found is None:
        return None, "there is no C compiler"
    command = [found, *named[1:]]
    folder = Path(__file__).parent
    names, defined = _LIBRARIES[weights]
    sources = [folder / name for name in names]
    try:
        # A home folder may be shared by machines, and what is made for one processor may not run on another.
        command += defined
        texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.[ch]"))]
        known = [*texts, *command, *names, repr(TRIED), *FLAGS, processor()]
        name = hashlib.sha256("\n".join(known).encode()).hexdigest()[:16]
        return _load(command, sources, name), ""
    except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
        _LOG.info("decoding without compiled code: %s", error)
        return None, str(error)


def _load(command: list[str], sources: list[Path], name: str) -> ctypes.CDLL:
    """From the cache folder; where that is not this user's alone to write, made for this process only."""
    made = cache_folder() / "native" / f"{name}.so"
    try:
        made.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        private = _private(made.parent) and os.access(made.parent, os.W_OK)
    except OSError:
        private = False
    if not private:
        with tempfile.TemporaryDirectory() as folder:  # a loaded library may be removed
            return ctypes.CDLL(str(compile_library(command, sources, Path(folder) / made.name)))
    if not (made.exists() and _private(made)):
        with tempfile.TemporaryDirectory(dir=made.parent) as folder:
            fresh = compile_library(command, sources, Path(folder) / made.name)
            fresh.chmod(0o700)
            sync(fresh)
            fresh.replace(made)
    return ctypes.CDLL(str(made))


def _private(path: Path) -> bool:
    """Whether nobody else may put code here."""
    state = path.stat()
    return state.st_uid == os.getuid() and not state.st_mode & 0o022
