"""Read, place and tokenise rows in several processes, for `pumice.data.check`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from pumice.conversation import IMAGE_PLACEHOLDER, Conversation, Video
from pumice.data.images import DecodedImage, decode_image, decode_video
from pumice.data.pictures import Image
from pumice.data.rows import ImageFinder, Row, Rows
from pumice.errors import InputError

Encode = Callable[[Conversation], tuple[int, int]]  # to (tokens, supervised tokens)
Finding = tuple[str, str]  # kind of problem, reason

MIN_FOR_PROCESSES = 2000  # fewer rows are checked here: starting processes takes as long
_ROWS_PER_TASK = 250  # rows that a process gets at once, of a source that reads any row alone


@dataclass(frozen=True)
class CheckedImage:
    """One image of a row: missing, a file, or a video or inside the source and then decoded already."""

    name: str
    missing: str = ""  # why
    path: Path | None = None
    decoded: DecodedImage | None = None


@dataclass
class CheckedRow:
    """What a process found out about a row. number: from 1. tokens: (all, supervised)."""

    number: int
    id: str = ""
    findings: list[Finding] = field(default_factory=list)
    malformed: bool = False
    images: list[CheckedImage] = field(default_factory=list)
    tokens: tuple[int, int] | None = None
    not_encoded: str = ""  # why


@dataclass(frozen=True)
class Scan:
    """How rows are checked. decode, compare: of images inside a source, as in `decode_image`."""

    sources: Sequence[Rows]
    finder: ImageFinder
    encode: Encode | None
    decode: bool
    compare: bool
    workers: int

    def rows(self, number: int) -> Iterator[CheckedRow]:
        """Yield every row of source `number`, in order."""
        source = self.sources[number]
        size = source.opened.shuffle_block if source.opened.shuffle_block > 1 else _ROWS_PER_TASK
        tasks = [(start, min(start + size, len(source))) for start in range(0, len(source), size)]
        if not self.workers or len(source) < MIN_FOR_PROCESSES:
            for start, end in tasks:
                yield from self.check(number, start, end)
            return
        done = 0
        try:
            # Spawned, not forked: a fork would copy other libraries' threads while they hold locks.
            with ProcessPoolExecutor(self.workers, get_context("spawn"), _start, (self, number)) as pool:
                for rows in pool.map(_check, tasks):
                    yield from rows
                    done += 1
        except BrokenProcessPool:
            # An image inside the source crashed its process. Go on row by row to find out which.
            for index in range(tasks[done][0], len(source)):
                yield self._check_in_own_process(number, index)

    def check(self, number: int, start: int, end: int) -> list[CheckedRow]:
        """Check rows start to end of source `number`."""
        return [self._check_row(self.sources[number], index) for index in range(start, end)]

    def _check_row(self, source: Rows, index: int) -> CheckedRow:
        try:
            row = source[index]
        except InputError as error:
            return CheckedRow(index + 1, findings=[("malformed row", str(error))], malformed=True)
        checked = CheckedRow(index + 1, row.id, images=[self._check_image(image, row) for image in row.image])
        try:
            row.conversation(None)
        except InputError as error:
            checked.findings.append((_turns_problem_kind(row), str(error)))
        else:
            if row.added:
                pictures = "1 picture" if row.added == 1 else f"{row.added} pictures"
                reason = f"{pictures} without {IMAGE_PLACEHOLDER}, which is put before the first question"
                checked.findings.append(("<image> added", reason))
            if self.encode is not None and not any(image.missing for image in checked.images):
                try:
                    checked.tokens = self.encode(row.conversation(self.finder))
                except InputError as error:
                    checked.not_encoded = str(error)
        return checked

    def _check_image(self, image: Image, row: Row) -> CheckedImage:
        name = image if isinstance(image, str) else image.name
        try:
            found = row.find(image, self.finder)
        except InputError as error:
            return CheckedImage(name, missing=str(error))
        if isinstance(found, Path):
            return CheckedImage(name, path=found)
        if not self.decode:
            return CheckedImage(name)
        if isinstance(found, Video):
            return CheckedImage(name, decoded=decode_video(found))
        return CheckedImage(name, decoded=decode_image(found, self.compare))

    def _check_in_own_process(self, number: int, index: int) -> CheckedRow:
        """Check one row in a new process, which it may crash."""
        try:
            with ProcessPoolExecutor(1, get_context("spawn"), _start, (self, number)) as pool:
                [row] = pool.submit(_check, (index, index + 1)).result()
                return row
        except BrokenProcessPool:
            reason = "its picture crashes the library that decodes it; remove it"
            return CheckedRow(index + 1, findings=[("picture unreadable", reason)], malformed=True)


_in_process: list[tuple[Scan, int]] = []  # what the rows of this process belong to


def _start(scan: Scan, number: int) -> None:
    _in_process[:] = [(scan, number)]


def _check(task: tuple[int, int]) -> list[CheckedRow]:
    scan, number = _in_process[0]
    return scan.check(number, *task)


def _turns_problem_kind(row: Row) -> str:
    placeholders = sum(text.count(IMAGE_PLACEHOLDER) for speaker, text in row.turns if speaker == "human")
    if placeholders != len(row.image):
        return "placeholder count"
    speakers = [speaker for speaker, _ in row.turns]
    if set(speakers) - {"human", "gpt", "system"}:
        return "unknown speaker"
    if any("\ud800" <= letter <= "\udfff" for _, text in row.turns for letter in text):
        return "broken text"
    if speakers[0] == "system":
        del speakers[0]
    if speakers != ["human", "gpt"] * (len(speakers) // 2):
        return "roles out of order"
    return "empty answer"
