"""Read a pickle of plain data from a stranger: nothing in it can name code."""

from __future__ import annotations

import io
import pickle
from typing import Any

from pumice.errors import InputError


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dictionaries, text and numbers. It admits no class and no function."""

    def find_class(self, module: str, name: str) -> Any:
        raise InputError(f"the pickle names the code {module}.{name}; only plain data is read")


def read_plain_pickle(data: bytes, label: str) -> Any:
    """Return the value of a pickle, also of Python 2. label: of its file, for messages.

    Raises InputError where it is damaged or names code.
    """
    try:
        return _PlainUnpickler(io.BytesIO(data), encoding="latin-1").load()
    except InputError as error:
        raise InputError(f"'{label}': {error}") from error
    except Exception as error:  # damaged bytes make the library raise errors of many kinds
        raise InputError(f"'{label}' is no whole pickle ({error}); fetch it again") from error
