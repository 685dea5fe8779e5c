"""Read a pickle of plain data from a stranger: nothing in it can name code."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pumice.errors import InputError


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dictionaries, text and numbers. It admits no class and no function of the file."""

    def __init__(self, data: bytes, stand_ins: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(io.BytesIO(data), encoding="latin-1")
        self._stand_ins = stand_ins

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._stand_ins:
            raise InputError(f"the pickle names the code {module}.{name}; only plain data is read")
        return self._stand_ins[module, name]

    def persistent_load(self, pid: Any) -> Any:
        return pid  # what names data outside the pickle is plain data itself


def read_plain_pickle(
    data: bytes, label: str, stand_ins: Mapping[tuple[str, str], Any] = MappingProxyType({})
) -> Any:
    """Return the value of a pickle, also of Python 2. label: of its file, for messages.

    stand_ins: (module, name) of code that the pickle may name -> what is used in its place. Raises InputError
    where it is damaged or names other code.
    """
    try:
        return _PlainUnpickler(data, stand_ins).load()
    except InputError as error:
        raise InputError(f"'{label}': {error}") from error
    except Exception as error:  # damaged bytes make the library raise errors of many kinds
        raise InputError(f"'{label}' is no whole pickle ({error}); fetch it again") from error
