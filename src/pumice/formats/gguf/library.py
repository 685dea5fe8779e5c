"""Find llama.cpp's own library, in the package llama-cpp-python: an extra that nothing else needs."""

from __future__ import annotations

import ctypes
from typing import Any

from pumice.errors import InputError, install

_KEPT: list[Any] = []  # what C code calls must not be freed


def llama_library(purpose: str) -> Any:
    """Return the module of llama.cpp's C functions. Raises InputError if the package is not installed.

    purpose: what needs it, for the message.
    """
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:  # not there, or its library does not load
        raise InputError(f"{purpose} needs llama-cpp-python: {install('llama')}") from error
    silence(llama_cpp)
    llama_cpp.llama_backend_init()
    return llama_cpp


def silence(library: Any, mtmd: Any = None) -> None:
    """Let llama.cpp write nothing to stderr."""

    def nothing(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        pass

    callback = library.llama_log_callback(nothing)
    _KEPT.append(callback)
    library.llama_log_set(callback, ctypes.c_void_p(0))
    if mtmd is not None:
        mtmd.mtmd_log_set(callback, ctypes.c_void_p(0))
        mtmd.mtmd_helper_log_set(callback, ctypes.c_void_p(0))
