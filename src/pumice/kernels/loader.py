"""Load the compiled C files of this folder from the cache folder. Compile them the first time."""

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
from pumice.kernels.compiler import FLAGS, TARGET_FLAGS, compile_library, processor

Weights = Literal["packed", "fp32"]

_PACKED_FILES = ("attend.c", "attend_tiles.c", "decode.c", "linear.c", "quantize.c")
# C files and their preprocessor definitions. "plain" is the reference for the kernels of each processor.
_LIBRARIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "packed": (_PACKED_FILES, ()),
    "plain": (_PACKED_FILES, ("-DPUMICE_PLAIN",)),
    "fp32": (("decode.c",), ("-DDENSE",)),
}
# Functions that return something else than an int.
_RETURN_TYPES = {"pumice_kernel": ctypes.c_char_p, "pumice_quantize": ctypes.c_int64}
_LOG = logging.getLogger("pumice")


@lru_cache(maxsize=3)
def compiled(weights: Weights | Literal["plain"] = "packed") -> tuple[ctypes.CDLL | None, str]:
    """Return the compiled code and "", or None and the reason why there is none."""
    if os.environ.get("PUMICE_NATIVE", "").lower() in ("off", "0"):
        return None, "PUMICE_NATIVE turns it off"
    if sys.platform == "win32":
        return None, "Windows is not supported"
    # 1. Find the compiler: the user's own, or the usual names.
    users_command = shlex.split(os.environ.get("CC", ""))
    candidates = users_command[:1] or ["cc", "gcc", "clang"]
    compiler = next(filter(None, map(shutil.which, candidates)), None)
    if compiler is None:
        return None, "there is no C compiler"
    folder = Path(__file__).parent
    file_names, definitions = _LIBRARIES[weights]
    command = [compiler, *users_command[1:], *definitions]
    try:
        # 2. Name the library by all that it is made from. The processor belongs to it: machines may share a
        #    home folder, and code for one processor may not run on another.
        texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.[ch]"))]
        hashed = [*texts, *command, *file_names, repr(TARGET_FLAGS), *FLAGS, processor()]
        name = hashlib.sha256("\n".join(hashed).encode()).hexdigest()[:16]
        return _load(command, [folder / file_name for file_name in file_names], name), ""
    except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
        _LOG.info("decoding without compiled code: %s", error)
        return None, str(error)


def _load(command: list[str], sources: list[Path], name: str) -> ctypes.CDLL:
    """Load the library from the cache folder, compiled if it is not there yet.

    If other users may write to the folder, the library is compiled for this process only.
    """
    library_path = cache_folder() / "native" / f"{name}.so"
    try:
        library_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        private = _private(library_path.parent) and os.access(library_path.parent, os.W_OK)
    except OSError:
        private = False
    if not private:
        with tempfile.TemporaryDirectory() as folder:  # a loaded library may be removed
            return open_library(compile_library(command, sources, Path(folder) / library_path.name))
    if not (library_path.exists() and _private(library_path)):
        # Compile elsewhere and rename: another process never loads half a file.
        with tempfile.TemporaryDirectory(dir=library_path.parent) as folder:
            fresh = compile_library(command, sources, Path(folder) / library_path.name)
            fresh.chmod(0o700)
            sync(fresh)
            fresh.replace(library_path)
    return open_library(library_path)


def open_library(path: Path) -> ctypes.CDLL:
    """Load a compiled library and set the return types of its functions."""
    library = ctypes.CDLL(str(path))
    for name, return_type in _RETURN_TYPES.items():
        if hasattr(library, name):  # the library for fp32 has only some of them
            getattr(library, name).restype = return_type
    return library


def _private(path: Path) -> bool:
    """Return whether only this user can write to the file or folder."""
    state = path.stat()
    return state.st_uid == os.getuid() and not state.st_mode & 0o022
