"""A cleaned copy of a file of rows: what can be mended is, what cannot be used is left out.

Knows rows and a report on them. The original is never written to.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from pumice.data.check import NOTES, DataReport
from pumice.data.rows import ImageFinder, Rows
from pumice.errors import InputError
from pumice.files import replacing


def fix(rows: Rows, finder: ImageFinder, report: DataReport, out: Path) -> Counter[str]:
    """Write the usable rows to `out`, a JSON list if it ends in .json, else JSON Lines; count what was done.

    Mended: a picture stored under another ending (the row then names the file that is there), an id that an
    earlier row has (a row that says the same is left out, another one gets a new id). Keys that Pumice does
    not know stay. Raises InputError when `out` is the file of the rows itself, under whatever name.
    """
    if out.exists() and out.samefile(rows.path):
        raise InputError(f"--fix {out} is the file that is checked; name a new one, the original stays")
    if not out.parent.is_dir():
        raise InputError(f"--fix {out}: there is no folder '{out.parent}'; make it first")
    kinds: dict[int, set[str]] = {}
    for problem in report.problems:
        if problem.source == rows.source:
            kinds.setdefault(problem.row, set()).add(problem.kind)
    done: Counter[str] = Counter(dict.fromkeys(("rows written", "rows left out"), 0))
    listed = out.suffix == ".json"
    ids: dict[str, set[str]] = {}  # id -> the rows that have it, as text
    with replacing(out) as file:
        file.write("[\n" if listed else "")
        for number in range(1, len(rows) + 1):
            found = kinds.get(number, set())
            if found - set(NOTES):
                done["rows left out"] += 1
                continue
            values = json.loads(rows.raw(number - 1))
            if "wrong extension" in found:
                written, values["image"] = values["image"], _stored_names(values["image"], finder)
                done["pictures named as they are stored"] += written != values["image"]
            if not _own_id(values, rows[number - 1].id, ids, done):
                continue
            comma = ",\n" if listed and done["rows written"] else ""
            file.write(comma + json.dumps(values, ensure_ascii=False) + ("" if listed else "\n"))
            done["rows written"] += 1
        file.write("\n]\n" if listed else "")
    return done


def _stored_names(image: Any, finder: ImageFinder) -> Any:
    names = [image] if isinstance(image, str) else image
    stored = [str(Path(name).with_name(finder.find(name).name).as_posix()) for name in names]
    return stored[0] if isinstance(image, str) else stored


def _own_id(values: dict[str, Any], row_id: str, ids: dict[str, set[str]], done: Counter[str]) -> bool:
    """Give the row an id of its own; False when an earlier row says the same under the same id."""
    text = json.dumps([values.get("image"), values["conversations"]])
    same = ids.setdefault(row_id, set())
    if text in same:
        done["repeated rows left out"] += 1
        return False
    if same:
        copy = 2
        while f"{row_id}-{copy}" in ids:
            copy += 1
        values["id"] = f"{row_id}-{copy}"
        ids[values["id"]] = {text}
        done["ids made different"] += 1
    same.add(text)
    return True
