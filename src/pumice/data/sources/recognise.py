"""Open rows by what their files hold, wherever they lie: a file, a folder, a glob, or a set on the hub."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pumice.data.sources.coco import lists_in, open_lists
from pumice.data.sources.columns import ColumnRows
from pumice.data.sources.folders import ClassFolders, ImageFolder, has_class_folders, is_visible
from pumice.data.sources.json_text import BOM, JsonRows
from pumice.data.sources.source import Joined, Source, reading
from pumice.data.sources.tables import Table, header_of
from pumice.data.sources.tars import TarRows
from pumice.errors import InputError
from pumice.media import PICTURES

HUB = "hf://"

# Files beside rows that are never rows themselves.
_SIDE_FILES = (
    "readme*",
    "licen[sc]e*",
    "dataset_info*.json",
    "state.json",
    "dataset_dict.json",
    "*.md",
    "*.py",
    "*.ini",
)
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "validation": "validation",
    "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
_SPLIT = re.compile(rf"(?:^|[/._-])({'|'.join(_SPLITS)})(?=[/._-]|\d|$)", re.IGNORECASE)
# Unpacking is left to the user: inside these no row can be read without all before it.
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"(\xb5/\xfd": "zstd",
}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
# Formats that hold no rows, and what is said of such a file. In a folder it is left out.
_WITHOUT_ROWS = {
    "other": "is no text file; give rows as JSON or JSON Lines",
    "text": (
        "is neither JSON nor a table of several columns; write one JSON object per line, or a first line "
        "with the columns' names"
    ),
}
_HEAD = 1 << 16  # bytes of a file that tell its format


@dataclass(frozen=True)
class Part:
    """Which part of a set of several: its split, its configuration, and its revision on the hub."""

    split: str | None = None
    config: str | None = None
    revision: str | None = None


def open_source(path: str | os.PathLike[str], part: Part | None = None) -> Source:
    """Return the rows of a file, a folder, a glob, or a set on the hub (hf://owner/name).

    Raises InputError when there is nothing, or nothing whose format is known, or more than one split.
    """
    name, part = os.fspath(path), part or Part()
    source, folder = _open_hub(name, part) if name.startswith(HUB) else _open_path(name, part)
    source.folder = source.folder or folder
    return source


def _open_path(name: str, part: Part) -> tuple[Source, Path]:
    """Return the rows at a path, and the folder beside which their pictures may lie."""
    if part.revision is not None:
        raise InputError(f"revision: {part.revision} is for sets on the hub (hf://...), and '{name}' is none")
    found = Path(name).expanduser()
    if found.is_dir():
        return _open_folder(found, part, name), found
    if not found.exists() and glob.has_magic(name):
        paths = [Path(p) for p in sorted(glob.glob(str(found), recursive=True)) if os.path.isfile(p)]
        if not paths:
            raise InputError(f"the rows '{name}' match no file; check the pattern")
        fixed = [*itertools.takewhile(lambda piece: not glob.has_magic(piece), found.parts)]
        return _open_files(_of_part(paths, Path(*fixed), part, name), name), Path(*fixed)
    return _open_files([found], name), found.parent


def is_missing(path: str) -> bool:
    """Whether there is nothing at a path that names a file or a folder."""
    return not (path.startswith(HUB) or glob.has_magic(path) or Path(path).expanduser().exists())


def format_of(path: Path) -> str:
    """Return the format of a file by its contents: one of `OPENERS` or of `_WITHOUT_ROWS`.

    Raises InputError for a file that may hold rows in a way that is not read, such as a packed one.
    """
    with reading(path), path.open("rb") as file:
        head = file.read(_HEAD)
    for name, beginnings in MAGIC.items():
        if head.startswith(beginnings):
            return name
    if head[257:262] == b"ustar":
        return "tar"
    if head.startswith(b"PK") and b"[Content_Types].xml" in head:
        raise InputError(f"'{path}' is an Excel workbook; save its table as CSV")
    for magic, packer in _PACKED.items():
        if head.startswith(magic):
            raise InputError(f"'{path}' is packed with {packer}; unpack it first")
    if head.startswith(_UTF16):
        raise InputError(f"'{path}' is in UTF-16; save it as UTF-8")
    if b"\0" in head:
        return "other"
    text = head.removeprefix(BOM).lstrip()
    if text.startswith(b"{"):
        return "lists" if lists_in(path) else "json"
    if not text or text.startswith(b"["):
        return "json"
    lines = text.split(b"\n")
    if header_of(lines[0].decode("utf-8", "replace").rstrip("\r")) is not None:
        return "table"
    # JSON Lines whose first line is damaged, or other text.
    return "json" if any(line.startswith(b"{") for line in lines) else "text"


# The formats that rows come in: how their files are opened, and, where that tells a format, how they begin.
OPENERS: dict[str, Callable[[Sequence[Path], str], Source]] = {
    "parquet": ColumnRows,
    "tar": TarRows,
    "arrow": ColumnRows,
    "lists": lambda paths, label: _join([open_lists(path) for path in paths], label),
    "json": lambda paths, label: _join([JsonRows(path) for path in paths], label),
    "table": lambda paths, label: _join([Table(path) for path in paths], label),
}
MAGIC: dict[str, tuple[bytes, ...]] = {"parquet": (b"PAR1",), "arrow": (b"ARROW1", b"\xff\xff\xff\xff")}


def _join(parts: list[Source], label: str) -> Source:
    # VQA's questions and annotations lead to the same rows.
    unique = {tuple(map(str, part.files)): part for part in parts}
    return next(iter(unique.values())) if len(unique) == 1 else Joined(list(unique.values()), label)


def _open_files(paths: Sequence[Path], label: str) -> Source:
    """Return the rows of some files. Raises InputError if one of them cannot hold rows."""
    formats = {path: format_of(path) for path in paths}
    for path, name in formats.items():
        if name in _WITHOUT_ROWS:
            raise InputError(f"'{path}' {_WITHOUT_ROWS[name]}")
    return _open_formats(formats, label)


def _open_formats(formats: Mapping[Path, str], label: str) -> Source:
    """Return the rows of files in these formats. Of several the one that is first in `OPENERS` counts."""
    for name, opener in OPENERS.items():
        if paths := [path for path, own in formats.items() if own == name]:
            return opener(paths, label)
    raise InputError(f"'{label}' holds no rows; write a JSON list or one JSON object per line")


def _open_folder(folder: Path, part: Part, label: str) -> Source:
    # 1. What `datasets.save_to_disk` writes, with a folder for each split or without.
    if (folder / "dataset_dict.json").is_file():
        folder = folder / _choose([path.name for path in folder.iterdir() if path.is_dir()], part, label)
    if (folder / "state.json").is_file() and (shards := sorted(folder.glob("*.arrow"))):
        return ColumnRows(shards, label)
    # 2. A table that describes pictures beside it.
    below = sorted(path for path in folder.rglob("*") if path.is_file() and _visible_below(path, folder))
    tables = [path for path in below if path.name.lower() in _METADATA]
    if tables:
        chosen = _of_part(tables, folder, part, label)
        return ImageFolder([_open_files([path], str(path)) for path in chosen], folder)
    # 3. Files of rows.
    files = [path for path in below if not _is_side_file(path)]
    pictures = {path.with_suffix("") for path in below if path.name.lower().endswith(PICTURES)}
    beside = len(files) > 1 and all(path.with_suffix("") in pictures for path in files)
    if beside and not _names_its_picture(files[0]):
        raise InputError(
            f"the folder '{label}' holds pictures and beside each a file of its name; pack them as "
            f"WebDataset: tar --sort=name -cf rows.tar -C '{label}' ."
        )
    formats: dict[Path, str] = {}
    refused: dict[Path, InputError] = {}
    for path in files:
        try:
            formats[path] = format_of(path)
        except InputError as error:  # told where the file is of the chosen part
            refused[path] = error
    files = [path for path in files if path in refused or formats[path] not in _WITHOUT_ROWS]
    if files:
        chosen = _of_part(files, folder, part, label)
        for path in chosen:
            if path in refused:
                raise refused[path]
        return _open_formats({path: formats[path] for path in chosen}, label)
    # 4. A folder of pictures for each class.
    names = [path.name for path in folder.iterdir() if path.is_dir() and is_visible(path)]
    if names and all(name.lower() in _SPLITS for name in names):
        folder = folder / _choose(names, part, label)
    if has_class_folders(folder):
        return ClassFolders(folder)
    endings = Counter(path.suffix.lower() or path.name for path in below).most_common(3)
    found = ", ".join(f"{count} {ending}" for ending, count in endings) or "nothing"
    raise InputError(f"the folder '{label}' holds no rows that can be read: {found}; name a file of rows")


def _names_its_picture(path: Path) -> bool:
    """Whether a file is JSON whose first row names the picture beside the file."""
    with contextlib.suppress(InputError, IndexError):
        values = JsonRows(path).record(0).values() if format_of(path) == "json" else ()
        return any(Path(str(v)).stem == path.stem and str(v).lower().endswith(PICTURES) for v in values)
    return False


def _visible_below(path: Path, folder: Path) -> bool:
    return not any(name.startswith(".") for name in path.relative_to(folder).parts)


def _is_side_file(path: Path) -> bool:
    name = path.name.lower()
    return name.endswith(PICTURES) or any(fnmatch(name, pattern) for pattern in _SIDE_FILES)


def _of_part(paths: Sequence[Path], folder: Path, part: Part, label: str) -> list[Path]:
    """Return the files of one configuration and one split, by the names of files and folders.

    Raises InputError when there are several and none is chosen, or the chosen one is not there.
    """
    chosen = list(paths)
    names = {path: path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
             for path in chosen}  # fmt: skip
    if part.config is not None:
        chosen = [path for path in chosen if part.config in names[path].split("/")[:-1]]
        if not chosen:
            folders = ", ".join(sorted({name.split("/")[0] for name in names.values() if "/" in name}))
            raise InputError(f"'{label}' has no config {part.config!r}; it has {folders or 'none'}")
    splits: dict[str, list[Path]] = {}
    for path in chosen:
        match = _SPLIT.search(names[path])
        splits.setdefault(_SPLITS[match[1].lower()] if match else "", []).append(path)
    if len(splits) > 1 and (unnamed := splits.pop("", None)):
        splits["train"] = [*splits.get("train", ()), *unnamed]
    if part.split is None and len(splits) == 1:
        return chosen
    return splits[_choose(list(splits), part, label)]


def _choose(splits: Sequence[str], part: Part, label: str) -> str:
    """Return the name of the chosen split as it is written."""
    wanted = None if part.split is None else _SPLITS.get(part.split.lower(), part.split)
    for name in splits:
        if wanted in (name, _SPLITS.get(name.lower(), name)) or (wanted is None and len(splits) == 1):
            return name
    listed = ", ".join(sorted(filter(None, splits))) or "none"
    if part.split is None:
        raise InputError(f"'{label}' has the splits {listed}; say which, for example split: {min(splits)}")
    raise InputError(f"'{label}' has no split {part.split!r}; it has {listed}")


def _open_hub(name: str, part: Part) -> tuple[Source, Path]:
    """Return the rows of a set on the hub, of which only the files of the chosen part are fetched."""
    from pumice.storage.download import from_hub

    repository = name.removeprefix(HUB)
    # The card may say which files make up a configuration and its splits. Else all files are fetched.
    folder = from_hub(repository, ["README.md"], revision=part.revision, kind="dataset")
    splits = _splits_of_card(folder / "README.md", part, name)
    if not splits:
        folder = from_hub(repository, revision=part.revision, kind="dataset")
        return _open_folder(folder, part, name), folder
    patterns = splits[_choose(list(splits), part, name)]
    folder = from_hub(repository, patterns, revision=part.revision, kind="dataset")
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return _open_files(files, name), folder


def _splits_of_card(card: Path, part: Part, label: str) -> dict[str, list[str]]:
    """Return split -> patterns of its files, as the `configs` of a dataset's card say; {} if it has none."""
    import yaml

    if not card.is_file() or not (text := card.read_text("utf-8", "replace")).startswith("---"):
        return {}
    try:
        configs: Any = {
            c["config_name"]: c["data_files"] for c in yaml.safe_load(text.split("---", 2)[1])["configs"]
        }
    except (yaml.YAMLError, KeyError, TypeError, IndexError):
        return {}
    config = part.config or ("default" if "default" in configs else next(iter(configs)))
    if config not in configs or (part.config is None and config != "default" and len(configs) > 1):
        raise InputError(
            f"'{label}' has the configs {', '.join(configs)}; say which, config: {next(iter(configs))}"
        )
    splits: dict[str, list[str]] = {}
    entries = configs[config]
    for entry in [entries] if isinstance(entries, str | dict) else entries:
        split, paths = ("train", entry) if isinstance(entry, str) else (entry["split"], entry["path"])
        splits.setdefault(split, []).extend([paths] if isinstance(paths, str) else paths)
    return splits
