"""Rows of any source, read lazily: each is a conversation and the pictures that it shows."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, overload

import numpy as np

from pumice.boxes import BoxError, check_objects
from pumice.conversation import (
    IMAGE_PLACEHOLDER,
    VIDEO_PLACEHOLDER,
    Conversation,
    StoredImage,
    Video,
    from_llava,
)
from pumice.data.arrays import kept
from pumice.data.contents import Contents, RowSummary, read_contents
from pumice.data.mapping import Mapped, RowMapping
from pumice.data.objects import stored
from pumice.data.pictures import Image
from pumice.data.sources.json_text import JsonRows
from pumice.data.sources.recognise import HUB, Part, open_source
from pumice.data.sources.source import Record
from pumice.data.sources.tables import Table
from pumice.errors import InputError
from pumice.files import sha256
from pumice.media import PICTURES


class ImageFinder:
    """Find the images that rows name in one or several folders ("roots"); the first match counts."""

    def __init__(self, roots: str | PathLike[str] | Sequence[str | PathLike[str]]) -> None:
        """Raises InputError when a root is not a folder or none is given."""
        folders = [roots] if isinstance(roots, str | PathLike) else list(roots)
        if not folders:
            raise InputError("no image folder is given; name at least one")
        self.roots = [Path(root) for root in folders]
        for root in self.roots:
            if not root.is_dir():
                raise InputError(f"the image folder '{root}' does not exist; check the path")

    def find(self, name: str, beside: Path | None = None, what: str = "picture") -> Path:
        """Return the file of image `name`, a path relative to a root or absolute.

        If it is missing, a file of the same stem with another image suffix is returned (mix665K names .jpg
        files that are .gif). beside: a folder that is searched after the roots. what: "picture" or "video",
        which is only found under its own name. Raises InputError when there is no file, and for a path that
        leaves its root.
        """
        # Text instead of Path until a file is found: a start looks for every picture of all rows.
        from_windows = name.replace("\\", "/")
        if os.path.normpath(from_windows).split(os.sep, 1)[0] == "..":
            raise InputError(f"{what} {name!r} leads out of the image folders; write the path without '..'")
        if name.startswith(("http://", "https://")):
            raise InputError(f"{what} {name!r} is a web address; save it to a file and name that")
        roots = self.roots if beside is None or beside in self.roots else [*self.roots, beside]
        # COCO 2014's names end as 2017's do.
        names = [name, name.rpartition("_")[2]] if os.path.basename(name).startswith("COCO_") else [name]
        names += [from_windows] if from_windows != name else []
        candidates = [os.path.join(root, n) for root in roots for n in names]  # an absolute name stays alone
        for candidate in candidates:
            if os.path.isfile(candidate):  # False for an overlong name, where Path.is_file raises
                return Path(candidate)
        for path in map(Path, candidates if what == "picture" else ()):
            for suffix in PICTURES:
                for variant in (suffix, suffix.upper()):
                    sibling = path.with_suffix(variant) if path.name else path
                    if os.path.isfile(sibling):
                        return sibling
        if Path(name).is_absolute():
            raise InputError(f"{what} {name!r} does not exist; check the path")
        listed = ", ".join(f"'{root}'" for root in roots)
        raise InputError(f"{what} {name!r} is not in {listed}; fetch it or name its folder")

    def find_any(self, image: Image, beside: Path | None = None) -> Path | StoredImage | Video:
        """Return a picture or a video of a row with its file. Raises InputError as `find`."""
        if isinstance(image, Video) and not _is_inside(image):
            return replace(image, source=self.find(image.name, beside, "video"))
        return self.find(image, beside) if isinstance(image, str) else image


@dataclass(frozen=True)
class Row(Mapped):
    """One row of a source. folder: where its pictures may be beside the roots of a finder."""

    source: str = ""
    folder: Path | None = field(default=None, compare=False)

    def conversation(self, finder: ImageFinder | None) -> Conversation:
        """Return the row as a checked Conversation with the paths of its images, or names without a finder.

        Raises InputError when a picture is missing, the placeholders do not match the pictures, or
        the turns are not question and answer in order; BoxError where `objects` do not fit the placeholders.
        """
        images: list[Any] = list(self.image)
        if finder is not None:
            images = [self.find(image, finder) for image in images]
        if not self.messages:
            conversation = from_llava(self.id, self.turns, images)
        else:
            remaining = iter(images)
            conversation = Conversation(self.messages, self.id).with_sources(lambda _: next(remaining))
        conversation = replace(conversation.check(answered=True), objects=self.objects)
        try:
            check_objects(conversation)
        except BoxError as error:
            raise BoxError(error.kind, f"row {self.id!r}: {error}") from error
        return conversation

    def find(self, image: Image, finder: ImageFinder) -> Path | StoredImage | Video:
        """Return one of the row's images as `conversation` does. Raises InputError when it is missing."""
        return finder.find_any(image, self.folder)


def to_llava(row: Row, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Return a row as LLaVA writes it. names: of its pictures, if not those that the row has."""
    shown: dict[str, list[Any]] = {"image": [], "video": []}
    for image, name in zip(row.image, row.image if names is None else names, strict=True):
        shown["video" if isinstance(image, Video) else "image"].append(
            name.source if isinstance(name, Video) else name
        )
    places = iter(VIDEO_PLACEHOLDER if isinstance(image, Video) else IMAGE_PLACEHOLDER for image in row.image)
    turns = [
        {
            "from": speaker,
            "value": re.sub(IMAGE_PLACEHOLDER, lambda _: next(places, IMAGE_PLACEHOLDER), text)
            if speaker == "human"
            else text,
        }
        for speaker, text in row.turns
    ]
    media = {key: named[0] if len(named) == 1 else named for key, named in shown.items() if named}
    objects = {} if row.objects is None else {"objects": stored(row.objects)}
    return {"id": row.id, **media, "conversations": turns, **objects}


class Rows(Sequence[Row]):
    """The rows of a source in any format; the contents decide which.

    A Rows can be pickled, forked and shared between threads.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        source: str = "",
        *,
        mapping: RowMapping | None = None,
        part: Part | None = None,
    ) -> None:
        """path: of a file or a folder, a glob, or hf://owner/name. source: what to call these rows in
        reports; the name without its suffix if empty. mapping: of columns to rows. part: of a set of several.

        Raises InputError when nothing there can be read as rows, or there are no rows.
        """
        name = os.fspath(path)
        self.path = Path(name)
        self.label = name if name.startswith(HUB) else str(self.path)
        self.source = source or self.path.stem
        self.mapping = mapping or RowMapping()
        self.opened = open_source(name, part)
        if not len(self.opened):
            form = self.opened.form
            if form == "JSON" and not any(file.read_bytes().strip() for file in self.opened.files):
                raise InputError(
                    f"'{path}' is empty; write a table, a JSON list or one JSON object per line into it"
                )
            remedy = "write a JSON list or one JSON object per line" if form == "JSON" else "add some"
            if form in ("TSV", "CSV"):
                remedy = "add some below its header"
            raise InputError(f"'{path}' holds no rows; {remedy}")

    def __len__(self) -> int:
        return len(self.opened)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        """Row `index`, from 0 (messages count from 1). Raises InputError when it is malformed."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        row = self._row(self.opened.record(index), index)
        # Training has read the contents by now. Who only looks at some rows does not wait for all of them.
        if "contents" in self.__dict__ and any(_is_inside(image) for image in row.image):
            row = self._keyed(row, index)
        return row

    def _row(self, record: Record, index: int) -> Row:
        mapped = self.mapping.read(record, self.opened.place(index), str(index + 1), self.opened.form)
        return Row(**vars(mapped), source=self.source, folder=self.opened.folder)

    def _keyed(self, row: Row, index: int) -> Row:
        """Return the row with the keys and sizes of its pictures, so that equal pictures are the same."""
        images: list[Image] = []
        for image, (key, size) in zip(row.image, self.contents.pictures_of(index), strict=True):
            if isinstance(image, StoredImage):
                image = replace(image, key=key, size=size)
            elif isinstance(image, Video) and isinstance(image.source, StoredImage):
                image = replace(image, source=replace(image.source, key=key))
            images.append(image)
        return replace(row, image=tuple(images))

    @cached_property
    def contents(self) -> Contents:
        """What training must know of all rows. Read once, and kept beside the cache until a file changes."""
        purpose = (
            f"contents, boxes, videos inside {sorted(self.mapping.columns.items())} {self.mapping.question}"
        )
        source = self.opened

        return Contents(kept(source.files, purpose, lambda: read_contents(self._summaries(), len(source))))

    def bad_rows(self, finder: ImageFinder) -> np.ndarray:
        """Return (rows,) bool: which rows cannot be used. Pictures and videos are found, but not opened."""

        def is_there(file: str | Video) -> bool:
            try:
                finder.find_any(file, self.opened.folder)
            except InputError:
                return False
            return True

        return ~self.contents.usable | self.contents.rows_without_images(is_there)

    def _summaries(self) -> Iterator[RowSummary]:
        for index, record in enumerate(self.opened.records()):
            try:
                if isinstance(record, InputError):
                    raise record
                row = self._row(record, index)
            except InputError as error:
                yield RowSummary(False, words=str(error))
                continue
            try:
                row.conversation(None)
                usable = True
            except InputError:
                usable = False  # why is said by the row itself, when it is read
            # A row without boxes keeps the digest that older runs have stored.
            words = (row.id, row.turns) if row.objects is None else (row.id, row.turns, stored(row.objects))
            yield RowSummary(usable, row.added > 0, row.image, words)

    def digest(self) -> str:
        """Return a digest of the rows, which says whether a resumed run has the same: hexadecimal digits."""
        if isinstance(self.opened, JsonRows | Table):  # of one file, as older versions stored it
            return _file_digest(self.opened.files[0])
        return self.contents.digest


def _is_inside(image: Image) -> bool:
    """Return whether a picture or a video lies inside the source of its row."""
    return isinstance(image.source if isinstance(image, Video) else image, StoredImage)


def _file_digest(path: Path) -> str:
    stored = kept([path], "sha256", lambda: {"sha256": np.frombuffer(bytes.fromhex(sha256(path)), np.uint8)})
    return stored["sha256"].tobytes().hex()
