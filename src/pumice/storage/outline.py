"""Fetch the outline of a model on the hub: all but the values of its weights, by requests for parts of files.

An outline is a folder with the model's small files. In place of a file of weights there is JSON of the same
name, {tensor: [type, shape]} with safetensors' names of types, or null where only the whole file says them.
`tensors.open_file` opens it; values of its tensors cannot be read. A GGUF file has its first bytes there, and
its reader fetches the parts that it wants (`RemoteFile`).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

from pumice.storage.plain_pickle import read_plain_pickle

LARGEST_HEADER = 100_000_000  # bytes of a file's description of its tensors, as safetensors admits them
BLOCK_BYTES = 1 << 20  # of a range request: most headers are smaller
# What stands for the code that the pickle of a state dict names.
_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL",
}  # fmt: skip
_STAND_INS: dict[tuple[str, str], Any] = {
    **{("torch", name): kind for name, kind in _STORAGES.items()},
    ("collections", "OrderedDict"): OrderedDict,
    # storage: ("storage", its type, its key, device, count)
    ("torch._utils", "_rebuild_tensor_v2"): lambda storage, start, shape, *_: {
        "dtype": storage[1], "shape": shape
    },
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
}  # fmt: skip
Entries = dict[str, tuple[str, list[int]]]  # tensor -> its type and shape


class ValuesNotHere(Exception):
    """A tensor of an outline was read, or a file without an outline: the weights must be fetched first."""


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub that is read in parts. size: its bytes. opener: opens it for reading."""

    size: int
    opener: Callable[[], Any]

    def read(self, start: int, count: int) -> bytes:
        """Fetch `count` bytes from `start` on, fewer at its end. Raises ValuesNotHere if that fails."""
        try:
            with self.opener() as file:
                file.seek(start)
                return bytes(file.read(count))
        except Exception as error:  # the kinds depend on the HTTP library
            raise ValuesNotHere("a file of this model") from error


class Outlines:
    """The outlines of one reading. missing: bytes of weights that they stand for and that are not here."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        """stack: removes the folder when it is closed."""
        self.missing = 0
        self.remote: dict[Path, RemoteFile] = {}  # what a file stands for
        self._stack = stack

    @cached_property
    def folder(self) -> Path:
        """The folder that holds them, made on first use: most models need none."""
        return Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="pumice-outlines-")))

    def stand_in(
        self, name: str, missing: Mapping[str, int], here: Mapping[str, Path], opener: Callable[[str], Any]
    ) -> Path:
        """Return a folder with files that stand for GGUF files of a repository, which are read in parts.

        missing: file -> its bytes on the hub, where `opener` opens it. here: file -> its path.
        """
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        self.missing += sum(size for file, size in missing.items() if folder / file not in self.remote)
        for file, size in missing.items():
            self.remote[folder / file] = RemoteFile(size, partial(opener, file))
        for file, path in here.items():
            self.remote[folder / file] = RemoteFile(path.stat().st_size, partial(path.open, "rb"))
        for path in self.remote:
            path.write_bytes(b"GGUF")  # by which the kind of a file is known
        return folder


_CURRENT: ContextVar[Outlines | None] = ContextVar("outlines", default=None)


def current_outlines() -> Outlines | None:
    """Return where outlines go; None where models are fetched whole."""
    return _CURRENT.get()


@contextlib.contextmanager
def outlines() -> Iterator[Outlines]:
    """Within the block, fetch only the outlines of models on the hub whose weights are not here."""
    with contextlib.ExitStack() as stack:
        current = Outlines(stack)
        token = _CURRENT.set(current)
        try:
            yield current
        finally:
            _CURRENT.reset(token)


def write_outline(
    folder: Path, small_files: Iterable[Path], weights: Iterable[str], opener: Callable[[str], Any]
) -> None:
    """Write a model's outline.

    small_files: all but its weights. weights: names of files. opener: opens one for reading.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in small_files:
        shutil.copyfile(path, folder / path.name)
    for name in weights:
        (folder / name).write_text(json.dumps(_fetch_entries(name, opener)), encoding="utf-8")


def remote_file(path: Path) -> RemoteFile | None:
    """Return the file on the hub that a file of an outline stands for, if it is read in parts."""
    current = current_outlines()
    return None if current is None else current.remote.get(path)


def is_outline(path: Path) -> bool:
    """Return whether a file is the outline of one. A file of a model is none, whatever it holds."""
    current = current_outlines()
    return current is not None and current.missing > 0 and current.folder in path.parents


def read_outline(path: Path) -> Entries:
    """Return the tensors of a file in an outline. Raises ValuesNotHere if only the whole file says them."""
    entries: Entries | None = json.loads(path.read_text(encoding="utf-8"))
    if entries is None:
        raise ValuesNotHere(path.name)
    return entries


def _fetch_entries(name: str, opener: Callable[[str], Any]) -> Entries | None:
    """Return the tensors of a file on the hub; None if only the whole file says them."""
    is_safetensors = name.endswith(".safetensors")
    try:
        with opener(name) as file:
            data = _header(file) if is_safetensors else _pickle(file)
    except Exception:  # the kinds depend on the HTTP library, and on how a file is damaged
        return None
    # A file of any other kind is perhaps not needed: that shows when it is opened.
    with contextlib.suppress(ValueError, RecursionError):
        return _entries(json.loads(data) if is_safetensors else read_plain_pickle(data, name, _STAND_INS))
    return None


def _header(file: BinaryIO) -> bytes:
    """Return the JSON in which a safetensors file describes its tensors."""
    (length,) = struct.unpack("<Q", file.read(8))
    if length > LARGEST_HEADER:
        raise ValueError(f"a header of {length} bytes")
    return file.read(length)


def _pickle(file: BinaryIO) -> bytes:
    """Return the pickle in which a `.bin`, a zip, describes its tensors without their values."""
    with zipfile.ZipFile(file) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
        if entry.file_size > LARGEST_HEADER:
            raise ValueError(f"a description of {entry.file_size} bytes")
        return archive.read(entry)


def _entries(described: Any) -> Entries:
    """Return the tensors of a description. Raises ValueError if it describes anything else."""
    if not isinstance(described, dict):
        raise ValueError("no dictionary of tensors")
    entries: Entries = {}
    for name, value in described.items():
        match value:
            case {"dtype": str(kind), "shape": [*shape]} if all(type(size) is int for size in shape):
                entries[str(name)] = kind, shape
            case _ if name != "__metadata__":  # safetensors' own entry
                raise ValueError(f"{name} is no tensor")
    return entries
