"""Read, place and tokenise rows in several processes, for `pumice.data.check`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pumice.boxes import BoxError, assumed_unit, picture_boxes
from pumice.conversation import BOX_PLACEHOLDER, IMAGE_PLACEHOLDER, Conversation, Objects, StoredImage, Video
from pumice.data.images import DecodedImage, decode_image, decode_video
from pumice.data.pictures import Image
from pumice.data.processes import map_parts
from pumice.data.rows import ImageFinder, Row, Rows
from pumice.errors import InputError, RowError, counted
from pumice.images import image_size

Encode = Callable[[Conversation], tuple[int, int]]  # to (tokens, supervised tokens)
Finding = tuple[str, str]  # kind of problem, reason

MIN_FOR_PROCESSES = 2000  # fewer rows are checked here: starting processes takes as long
_ROWS_PER_TASK = 250  # rows that a process gets at once, of a source that reads any row alone


@dataclass(frozen=True)
class CheckedImage:
    """One image or video of a row: missing, a file, or inside the source and then decoded already."""

    name: str
    missing: str = ""  # why
    file: Path | Video | None = None
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
        parts = [range(start, min(start + size, len(source))) for start in range(0, len(source), size)]
        workers = self.workers if len(source) >= MIN_FOR_PROCESSES else 0
        for rows in map_parts(partial(self._check, number), parts, workers, _crashed):
            yield from rows

    def _check(self, number: int, part: Sequence[int]) -> list[CheckedRow]:
        return [self._check_row(self.sources[number], index) for index in part]

    def _check_row(self, source: Rows, index: int) -> CheckedRow:
        try:
            row = source[index]
        except InputError as error:
            return CheckedRow(index + 1, findings=[_malformed(error)], malformed=True)
        checked = CheckedRow(index + 1, row.id, images=[self._check_image(image, row) for image in row.image])
        try:
            row.conversation(None)
        except InputError as error:
            checked.findings.append(_malformed(error))
        else:
            if row.objects is not None and not any(image.missing for image in checked.images):
                checked.findings += self._box_findings(row, row.objects)
            if row.added:
                reason = f"without {IMAGE_PLACEHOLDER}, which is put before the first question"
                checked.findings.append(("<image> added", f"{counted(row.added, 'picture')} {reason}"))
            if self.encode is not None and not any(image.missing for image in checked.images):
                try:
                    checked.tokens = self.encode(row.conversation(self.finder))
                except InputError as error:
                    checked.not_encoded = str(error)
        return checked

    def _box_findings(self, row: Row, objects: Objects) -> list[Finding]:
        """Compare the boxes of a row with its pictures, whose headers are read."""
        found: list[Finding] = []
        try:
            files = [row.find(image, self.finder) for image in row.image]
            # `check_objects` has refused videos.
            picture_boxes(objects, [image_size(file) for file in files if not isinstance(file, Video)])
        except BoxError as error:
            found.append((error.kind, f"row {row.id!r}: {error}"))
        except InputError:
            return []  # a picture that cannot be opened is told as such
        if objects.boxes and not objects.unit:
            found.append(
                ("unit of boxes assumed", f"no bbox_type: its boxes are read as {assumed_unit(objects)}")
            )
        text = "".join(text for _, text in row.turns)
        if (unused := len(objects.boxes) - text.count(BOX_PLACEHOLDER)) > 0:
            reason = (
                f"{counted(unused, 'box', 'have', of=len(objects.boxes))} no {BOX_PLACEHOLDER} in its texts"
            )
            found.append(("boxes not used", reason))
        return found

    def _check_image(self, image: Image, row: Row) -> CheckedImage:
        name = image if isinstance(image, str) else image.name
        try:
            found = row.find(image, self.finder)
        except InputError as error:
            return CheckedImage(name, missing=str(error))
        if isinstance(found, Video) and isinstance(found.source, StoredImage):
            return CheckedImage(name, decoded=decode_video(found) if self.decode else None)
        if not isinstance(found, StoredImage):
            return CheckedImage(name, file=found)
        return CheckedImage(name, decoded=decode_image(found, self.compare) if self.decode else None)


def _malformed(error: InputError) -> Finding:
    return error.kind if isinstance(error, RowError) else "malformed row", str(error)


def _crashed(index: int) -> CheckedRow:
    reason = "its picture crashes the library that decodes it; remove it"
    return CheckedRow(index + 1, findings=[("picture unreadable", reason)], malformed=True)
