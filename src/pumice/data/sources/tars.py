"""Rows as WebDataset shards: tar archives whose files of one sample have one name and several endings."""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pumice.data.arrays import kept
from pumice.data.sources.source import OpenFiles, Record, Source, reading
from pumice.errors import InputError
from pumice.jsonl import json_fault

_PICTURES = re.compile(r"(?:.*\.)?(?:jpe?g|png|webp|gif|bmp|tiff?|ppm|jp2|avif|heic)", re.IGNORECASE)
_TEXTS = {"txt": "text", "text": "text", "caption": "caption", "cls": "label"}
_TABLES = (".jsonl", ".csv", ".tsv", ".parquet", ".arrow")  # of a packed folder, which is no WebDataset
# An animation is a picture, unless its name ends with `.video.gif`, for example.
VIDEO_ENDINGS = re.compile(
    r"(?:.*\.)?(?:mp4|m4v|webm|avi|mov|mkv|mpe?g|flv|ogv|video\.(?:gif|webp|png))", re.IGNORECASE
)
_SOUNDS = ("wav", "mp3", "flac", "ogg", "m4a")  # told, and never learned as text
_CUT = "!cut"  # the ending of a sample in which its archive is cut off


class TarRows(Source):
    """The samples of WebDataset shards. A sample's `.json` gives columns, `.txt` a text, `.cls` a label."""

    form = "WebDataset"
    shuffle_block = 1000

    def __init__(self, paths: Sequence[Path], label: str) -> None:
        """Raises InputError when a file cannot be read or is no archive."""
        self.files, self.label = list(paths), label
        arrays = kept(self.files, "members", self._index)
        # Of each member: its shard, where its contents begin, and their size. Names are "key\nending".
        self._members, self._names = arrays["members"], arrays["names"]
        self._name_ends, self._first = arrays["name_ends"], arrays["first"]
        shards = self._members[self._first[:-1], 0]
        self._first_of_shard = np.searchsorted(shards, np.arange(len(self.files)))
        self._contents = OpenFiles(self.files)

    def __len__(self) -> int:
        return len(self._first) - 1

    def place(self, index: int) -> str:
        shard = int(self._members[self._first[index], 0])
        key = self._name(int(self._first[index]))[0]
        return f"'{self.files[shard]}', row {index - int(self._first_of_shard[shard]) + 1} (sample {key!r})"

    def record(self, index: int) -> Record:
        record: Record = {}
        media: dict[str, list[Any]] = {"image": [], "video": []}
        for member in range(int(self._first[index]), int(self._first[index + 1])):
            shard, start, size = self._members[member].tolist()
            key, ending = self._name(member)
            if ending == _CUT:
                raise InputError(f"{self.place(index)}: the archive is cut off here; fetch it again")
            record.setdefault("__key__", key)
            is_picture = _PICTURES.fullmatch(ending)
            kind = "video" if VIDEO_ENDINGS.fullmatch(ending) else "image" if is_picture else ""
            if kind:
                name = f"{self.files[shard]}, {key}.{ending}"
                media[kind].append(self._contents.stored_image(shard, start, size, name))
            elif ending == "json" or ending in _TEXTS:
                self._add(record, index, ending, self._contents.read(shard, start, size))
            else:
                record.setdefault("audio" if ending in _SOUNDS else ending, f"{key}.{ending}")
        for kind, files in media.items():
            if files:
                # Names inside the .json are of files that became members of the archive.
                for column in (f"{kind}s", kind):
                    record.pop(column, None)
                record[f"{kind}s" if len(files) > 1 else kind] = files if len(files) > 1 else files[0]
        return record

    def _add(self, record: Record, index: int, ending: str, data: bytes) -> None:
        try:
            if ending != "json":
                record[_TEXTS[ending]] = data.decode().strip()
                return
            values = json.loads(data)
        except (ValueError, RecursionError) as error:
            what = f"JSON ({json_fault(error)})" if ending == "json" else "UTF-8 text"
            raise InputError(f"{self.place(index)}: its .{ending} is not {what}; fix it") from error
        if isinstance(values, dict):
            record |= values
        elif isinstance(values, list):
            keys = values[0] if values and isinstance(values[0], dict) else ()
            record["texts" if "user" in keys else "conversations" if "from" in keys else "messages"] = values
        else:
            record["text"] = values

    def _name(self, member: int) -> tuple[str, str]:
        start = int(self._name_ends[member - 1]) if member else 0
        text = self._names[start : int(self._name_ends[member])].tobytes().decode("utf-8", "replace")
        key, _, ending = text.partition("\n")
        return key, ending

    def _index(self) -> dict[str, np.ndarray]:
        members: list[tuple[int, int, int]] = []
        names: list[bytes] = []
        first: list[int] = []
        for shard, path in enumerate(self.files):
            key = None
            found = _read_members(path)
            sizes = Counter(_key_and_ending(name)[0] for name, *_ in found)
            for name, start, size in found:
                own_key, ending = _key_and_ending(name)
                if name.lower().endswith(_TABLES) and sizes[own_key] == 1:
                    raise InputError(f"'{path}' holds {name!r}, a file of rows; unpack it and give that file")
                if own_key != key:
                    first.append(len(members))
                    key = own_key
                members.append((shard, start, size))
                names.append(f"{own_key}\n{ending if ending == _CUT else ending.lower()}".encode())
        return {
            "members": np.array(members, np.int64).reshape(-1, 3),
            "names": np.frombuffer(b"".join(names), np.uint8),
            "name_ends": np.cumsum([len(name) for name in names], dtype=np.int64),
            "first": np.array([*first, len(members)], np.int64),
        }


def _key_and_ending(name: str) -> tuple[str, str]:
    """Return the key of a member's sample, and what stands behind the first dot of the member's name."""
    ending = name.rpartition("/")[2].partition(".")[2]
    return (name[: -len(ending) - 1], ending) if ending else (name, "")


def _read_members(path: Path) -> list[tuple[str, int, int]]:
    """Return (name, where its contents begin, their size) of each file in an archive.

    If the archive is cut off, the last file is followed by one of its name with the ending `_CUT`.
    """
    found: list[tuple[str, int, int]] = []
    try:
        with reading(path), tarfile.open(path, "r:") as archive:
            whole = True
            try:
                while (member := archive.next()) is not None:
                    if member.isfile() and not member.name.rpartition("/")[2].startswith("."):
                        found.append((member.name, member.offset_data, member.size))
            except tarfile.ReadError:
                whole = False
            # An archive ends with blocks of zeros. One that does not was cut off, if only between two files.
            with path.open("rb") as file:
                file.seek(archive.offset)
                whole = whole and file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
            if found and not whole:
                folder, slash, name = found[-1][0].rpartition("/")
                found.append((f"{folder}{slash}{name.partition('.')[0]}.{_CUT}", 0, 0))
    except tarfile.TarError as error:
        raise InputError(f"'{path}' is cut off or no tar archive ({error}); fetch it again") from error
    return found
