"""What every source of rows can do: its length, one row by number, and all rows in order."""

from __future__ import annotations

import bisect
import itertools
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from pumice.conversation import StoredImage
from pumice.errors import CAUSE, InputError, wrong_input

Record = dict[str, Any]  # column -> value: JSON's types, and StoredImage for a picture inside the source

MAX_OPEN = 32  # files that one source keeps open


class Source(ABC):
    """Rows in one format, read one at a time from where they lie. It can be pickled and shared by threads."""

    form: str  # of the rows, for messages: "JSON Lines"
    label: str  # the path as the user gave it, for messages
    files: Sequence[Path]  # their sizes and times tell whether the rows changed
    folder: Path | None = None  # where the rows' pictures may lie, beside the roots of a finder
    shuffle_block = 1  # rows that are read together: 1 where any row is read as fast as the next one

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def record(self, index: int) -> Record:
        """Return row `index`, from 0, as it is written. Raises InputError, which begins with `place`."""

    def place(self, index: int) -> str:
        """Return where row `index` stands, for messages."""
        return f"'{self.label}', row {index + 1}"

    def records(self) -> Iterator[Record | InputError]:
        """Yield every row in order, or the error of one that cannot be read."""
        for index in range(len(self)):
            try:
                yield self.record(index)
            except InputError as error:
                yield error

    def keep(self, rows: int) -> None:
        """Make room to read `rows` rows, in whole blocks, in any order without reading a block twice."""
        del rows  # most sources read any row as fast as the next one


class Joined(Source):
    """Several sources, one after the other."""

    def __init__(self, parts: Sequence[Source], label: str) -> None:
        self.parts, self.label = list(parts), label
        self.form = ", ".join(dict.fromkeys(part.form for part in self.parts))
        self.files = [file for part in self.parts for file in part.files]
        self.shuffle_block = max(part.shuffle_block for part in self.parts)
        self._ends = list(itertools.accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def record(self, index: int) -> Record:
        part, own = self._find(index)
        return part.record(own)

    def place(self, index: int) -> str:
        part, own = self._find(index)
        return part.place(own)

    def records(self) -> Iterator[Record | InputError]:
        for part in self.parts:
            yield from part.records()

    def keep(self, rows: int) -> None:
        for part in self.parts:
            part.keep(rows)

    def _find(self, index: int) -> tuple[Source, int]:
        number = bisect.bisect_right(self._ends, index)
        return self.parts[number], index - (self._ends[number - 1] if number else 0)


class OpenFiles:
    """Files that stay open to read parts of them; safe in threads, and it can be pickled."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self._lock = threading.Lock()
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()

    def read(self, number: int, start: int, size: int) -> bytes:
        """Return `size` bytes of file `number` from `start`. Raises InputError when it cannot be read."""
        with self._lock, reading(self.paths[number]):
            if number not in self._open:
                self._open[number] = self.paths[number].open("rb")
                if len(self._open) > MAX_OPEN:
                    self._open.popitem(last=False)[1].close()
            self._open.move_to_end(number)
            self._open[number].seek(start)
            return self._open[number].read(size)

    def stored_image(self, number: int, start: int, size: int, name: str) -> StoredImage:
        """Return a picture that is a part of file `number`."""
        return StoredImage((id(self), number, start), name, partial(self.read, number, start, size))

    def __del__(self) -> None:
        for file in self._open.values():
            file.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenFiles, (self.paths,)


def reading(path: Path | str) -> AbstractContextManager[None]:
    """Return a context in which an error of the system says that the rows cannot be read."""
    return wrong_input(OSError, f"the rows '{path}' cannot be read: {CAUSE}; check the path")
