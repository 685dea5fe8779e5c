"""Find llama.cpp's own library, in the package llama-cpp-python: an extra that nothing else needs."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from pumice.errors import InputError, install


def llama_library(purpose: str) -> Any:
    """Return the module of llama.cpp's C functions, which then write nothing to stderr.

    purpose: what needs it, for the message. Raises InputError if the package is not installed.
    """
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:  # not there, or its library does not load
        raise InputError(f"{purpose} needs llama-cpp-python: {install('llama')}") from error
    llama_cpp.llama_log_set(_silence(llama_cpp), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


def mtmd_library(purpose: str) -> Any:
    """Return the module of the C functions that read pictures; as `llama_library`."""
    library = llama_library(purpose)
    try:
        from llama_cpp import mtmd_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise InputError(f"{purpose} needs a newer llama-cpp-python: {install('llama')}") from error
    callback = _silence(library)
    mtmd_cpp.mtmd_log_set(callback, ctypes.c_void_p(0))
    mtmd_cpp.mtmd_helper_log_set(callback, ctypes.c_void_p(0))
    return mtmd_cpp


@functools.cache  # what C code calls must not be freed
def _silence(library: Any) -> Any:
    def nothing(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        pass

    return library.llama_log_callback(nothing)
