"""Find llama.cpp's own library, in the package llama-cpp-python: an extra that nothing else needs."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from pumice.errors import library


def llama_library(purpose: str) -> Any:
    """Return the module of llama.cpp's C functions, which then write nothing to stderr.

    purpose: what needs it, for the message. Raises InputError if the package is not installed.
    """
    llama_cpp = library("llama_cpp", f"{purpose} needs llama-cpp-python", "llama")
    llama_cpp.llama_log_set(_silence(llama_cpp), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


def mtmd_library(purpose: str) -> Any:
    """Return the module of the C functions that read pictures; as `llama_library`."""
    callback = _silence(llama_library(purpose))
    mtmd_cpp = library("llama_cpp.mtmd_cpp", f"{purpose} needs a newer llama-cpp-python", "llama")
    mtmd_cpp.mtmd_log_set(callback, ctypes.c_void_p(0))
    mtmd_cpp.mtmd_helper_log_set(callback, ctypes.c_void_p(0))
    return mtmd_cpp


@functools.cache  # what C code calls must not be freed
def _silence(llama_cpp: Any) -> Any:
    def nothing(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        pass

    return llama_cpp.llama_log_callback(nothing)
