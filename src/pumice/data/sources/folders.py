"""Rows as folders of pictures: one folder for each class, or pictures beside a table that describes them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pumice.data.sources.source import Joined, Record, Source
from pumice.errors import InputError
from pumice.media import PICTURES


class ClassFolders(Source):
    """Pictures in folders, the name of the folder being the answer."""

    form = "a folder for each class"

    def __init__(self, folder: Path) -> None:
        """Raises InputError when one of the folders holds no picture."""
        self.folder, self.label, self.files = folder, str(folder), [folder]
        self._names: list[str] = []
        for path in sorted(entry for entry in folder.iterdir() if entry.is_dir() and is_visible(entry)):
            names = pictures_below(path)
            if not names:
                raise InputError(f"the class folder '{path}' holds no picture; add some or remove it")
            self._names += [f"{path.name}/{name}" for name in names]

    def __len__(self) -> int:
        return len(self._names)

    def record(self, index: int) -> Record:
        name = self._names[index]
        label = name.partition("/")[0].replace("_", " ")
        return {"id": name.rpartition(".")[0], "image": name, "label": label}


class ImageFolder(Joined):
    """Tables named `metadata`, whose column `file_name` names pictures beside them."""

    def __init__(self, tables: list[Source], folder: Path) -> None:
        super().__init__(tables, str(folder))
        self.form = f"a folder of pictures with {self.form}"
        self.folder = folder

    def record(self, index: int) -> Record:
        part, own = self._find(index)
        record = part.record(own)
        below = os.path.relpath(Path(part.label).parent, self.folder or ".")
        for column in ("file_name", "file_names"):
            if isinstance(names := record.get(column), str):
                record[column] = os.path.normpath(os.path.join(below, names))
            elif isinstance(names, list):
                record[column] = [os.path.normpath(os.path.join(below, str(name))) for name in names]
        return record

    def records(self) -> Iterator[Record | InputError]:
        return Source.records(self)


def is_visible(path: Path) -> bool:
    return not path.name.startswith((".", "_"))


def pictures_below(folder: Path) -> list[str]:
    """Return the pictures below a folder, at any depth, as paths relative to it, in order."""
    found: list[str] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = os.path.relpath(parent, folder).replace(os.sep, "/")
        prefix = "" if below == "." else f"{below}/"
        found += [prefix + name for name in sorted(names) if name.lower().endswith(PICTURES)]
    return found


def has_class_folders(folder: Path) -> bool:
    """Whether at least one folder directly below holds pictures."""
    return any(pictures_below(path) for path in folder.iterdir() if path.is_dir() and is_visible(path))
