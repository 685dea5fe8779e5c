"""Write a cleaned copy of rows: fix what can be fixed and leave out unusable rows."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from pumice.conversation import Video
from pumice.data.check import NOTES, DataReport
from pumice.data.pictures import MEDIA
from pumice.data.rows import ImageFinder, Row, Rows, to_llava
from pumice.errors import InputError
from pumice.files import replacing


def fix(rows: Rows, finder: ImageFinder, report: DataReport, out: Path) -> Counter[str]:
    """Write the usable rows to `out` and return counts of what was done; the original is not changed.

    `out` is a JSON list if it ends in .json, else JSON Lines, in LLaVA's form. An image that is stored with
    another suffix gets its real name, and one without `<image>` gets it. A row with an earlier row's id is
    left out if it says the same, and gets a new id if not. Keys that Pumice does not know stay. Raises
    InputError when `out` is the file of the rows itself, or the pictures are inside the source.
    """
    # 1. Refuse to overwrite the original, and gather the kinds of problems of each row.
    if out.exists() and any(out.samefile(file) for file in rows.opened.files):
        raise InputError(f"--fix {out} is the file that is checked; name a new one, the original stays")
    if not out.parent.is_dir():
        raise InputError(f"--fix {out}: there is no folder '{out.parent}'; make it first")
    if rows.contents.has_stored:
        raise InputError(
            f"--fix: the pictures of '{rows.label}' are inside it; use pumice data convert first"
        )
    kinds: dict[int, set[str]] = {}
    for problem in report.problems:
        if problem.source == rows.source:
            kinds.setdefault(problem.row, set()).add(problem.kind)
    counts: Counter[str] = Counter(dict.fromkeys(("rows written", "rows left out"), 0))
    is_list = out.suffix == ".json"
    ids: dict[str, set[bytes]] = {}  # id -> hashes of the rows that have it
    # 2. Write row after row into a temporary file that replaces `out` at the end.
    with replacing(out) as file:
        file.write("[\n" if is_list else "")
        for number in range(1, len(rows) + 1):
            problem_kinds = kinds.get(number, set())
            if problem_kinds - set(NOTES):
                counts["rows left out"] += 1
                continue
            row = rows[number - 1]
            values = _values(rows.opened.record(number - 1), row)
            if "wrong extension" in problem_kinds:
                old_names, values["image"] = values["image"], _stored_names(values["image"], row, finder)
                counts["pictures named as they are stored"] += old_names != values["image"]
            counts["rows given <image>"] += "<image> added" in problem_kinds
            if not _make_id_unique(values, row, ids, counts):
                continue
            comma = ",\n" if is_list and counts["rows written"] else ""
            file.write(comma + json.dumps(values, ensure_ascii=False) + ("" if is_list else "\n"))
            counts["rows written"] += 1
        file.write("\n]\n" if is_list else "")
    return counts


def _values(record: dict[str, Any], row: Row) -> dict[str, Any]:
    """Return a row in LLaVA's form: as it is written, if it has this form and needs no `<image>`."""
    if "conversations" in record and not row.added:
        images = [image for image in row.image if not isinstance(image, Video)]
        if images in ([], record.get("image"), [record.get("image")]):
            return dict(record)
    kept = {key: value for key, value in record.items() if key not in MEDIA}
    return {**(kept if "conversations" in record else {}), **to_llava(row)}


def _stored_names(image: Any, row: Row, finder: ImageFinder) -> Any:
    names = [image] if isinstance(image, str) else image
    stored = [str(Path(name).with_name(finder.find(name, row.folder).name).as_posix()) for name in names]
    return stored[0] if isinstance(image, str) else stored


def _make_id_unique(
    values: dict[str, Any], row: Row, ids: dict[str, set[bytes]], counts: Counter[str]
) -> bool:
    """Give the row a new id if an earlier row has it. Return False if that row also says the same."""
    said = {**to_llava(row), "id": "", "image": values.get("image")}  # as its files are really called
    contents = hashlib.blake2b(json.dumps(said).encode(), digest_size=16).digest()
    same = ids.setdefault(row.id, set())
    if contents in same:
        counts["repeated rows left out"] += 1
        return False
    if same:
        copy = 2
        while f"{row.id}-{copy}" in ids:
            copy += 1
        values["id"] = f"{row.id}-{copy}"
        ids[values["id"]] = {contents}
        counts["ids made different"] += 1
    same.add(contents)
    return True
