"""Build one shuffled file of LLaVA rows from a recipe of sources, with a manifest of what went in.

Rows lie in a temporary database, so memory does not grow with their number. The same files, recipe and seed
give the same bytes.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pumice import __version__
from pumice.errors import InputError, check_known, counted, official
from pumice.files import replacing, sha256
from pumice.storage.yaml_file import read_yaml
from pumice.synth.checks import conversations
from pumice.synth.mix.readers import READERS, Reader, ReaderInput, Unit


class MixModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MixSource(MixModel):
    """One task of a mixture."""

    task: str = Field(description="llava, sharegpt, vqav2, gqa, okvqa, aokvqa, ocrvqa, textcaps, refcoco, vg")
    files: dict[str, Path | list[Path]] = Field(description="role -> official file, or files")
    name: str = Field("", description="in ids and in the manifest; the task's when absent")
    images: str = Field("", description="put before each picture's name, such as coco/train2017")
    weight: float = Field(1.0, gt=0, description="how often each row is taken; 0.5 is a random half")
    rows: int | None = Field(None, ge=1, description="instead of a weight: take so many, at random")
    longest: int = Field(8000, ge=1, description="characters of a text-only chat")


class Mix(MixModel):
    """A whole mixture. Relative paths are relative to the folder in which the command runs."""

    sources: list[MixSource] = Field(min_length=1)
    seed: int = Field(0, ge=0)
    boxes: Literal["padded", "picture"] = Field("padded", description="what box coordinates are shares of")


def load(path: Path) -> Mix:
    """Read a recipe. Raises InputError that names the key."""
    values = read_yaml(path)
    try:
        mix = Mix.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        field_path = ".".join(map(str, problem["loc"])) or "the recipe"
        raise InputError(f"{path}: {field_path}: {problem['msg']}") from error
    names = [source.name or source.task for source in mix.sources]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"{path}: two sources are called '{min(twice)}'; give each its own name")
    for source in mix.sources:
        _files(source, path)
    return mix


def _files(source: MixSource, recipe: Path) -> dict[str, list[Path]]:
    check_known(source.task, READERS, f"{recipe}: there is no task '{source.task}'")
    reader = READERS[source.task]
    files = {role: f if isinstance(f, list) else [f] for role, f in source.files.items()}
    if missing := [role for role in reader.needs if not files.get(role)]:
        raise InputError(f"{recipe}: {source.task} needs the file '{missing[0]}'; add it to files")
    if unknown := [role for role in files if role not in (*reader.needs, *reader.may)]:
        known = ", ".join((*reader.needs, *reader.may))
        raise InputError(f"{recipe}: {source.task} has no file '{unknown[0]}'; its files are {known}")
    for listed in files.values():
        for file in listed:
            if not file.is_file():
                raise InputError(
                    f"{recipe}: the file '{file}' of {source.task} does not exist; check the path"
                )
    return files


def build(mix: Mix, out: Path, seed: int | None = None) -> dict[str, Any]:
    """Write the rows and, beside them, OUT.manifest.json; returns the manifest. InputError on wrong files."""
    if out.suffix not in (".json", ".jsonl"):
        raise InputError(f"the output '{out}' is neither .json nor .jsonl; name one of them")
    if not out.parent.is_dir():
        raise InputError(f"the folder '{out.parent}' does not exist; create it")
    seed = mix.seed if seed is None else seed
    store = sqlite3.connect("")  # SQLite's name for a temporary file of its own
    store.executescript(
        "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -65536;"
        "CREATE TABLE units (first INTEGER, number INTEGER, image TEXT, turns TEXT, "
        "PRIMARY KEY (first, number)) WITHOUT ROWID;"
        "CREATE TABLE rows (number INTEGER PRIMARY KEY, row TEXT);"
    )
    told, chosen, stored = [], [], 0
    for number, source in enumerate(mix.sources):
        files = _files(source, out)
        if any(file.resolve() == out.resolve() for listed in files.values() for file in listed):
            raise InputError(f"'{out}' is a file to be mixed; name another one to write")
        inputs = ReaderInput(files, source.images, seed, mix.boxes == "padded", source.longest)
        reader, name = READERS[source.task], source.name or source.task
        first = stored
        turns = 0
        for row in _rows(store, reader, inputs, name):
            store.execute("INSERT INTO rows VALUES (?, ?)", (stored, json.dumps(row, ensure_ascii=False)))
            stored += 1
            turns += len(row["conversations"]) // 2
        available = stored - first
        if not available:
            raise InputError(f"{name}: its files hold no usable row; look at {', '.join(map(str, files))}")
        picks = _sample(available, source, np.random.default_rng([seed, number]), name)
        chosen.append(picks + first)
        told.append(
            {
                "name": name, "task": source.task, "weight": source.weight, "entries": inputs.items,
                "available": available, "turns": turns, "rows": len(picks),
                "skipped": dict(inputs.skipped),
                "files": [_fingerprint(role, file) for role, listed in files.items() for file in listed],
                "reference": _reference(reader, inputs.items, available, name),
            }
        )  # fmt: skip
    order = np.random.default_rng(seed).permutation(np.concatenate(chosen))
    _write(store, order, out)
    manifest = {
        "pumice": __version__, "seed": seed, "boxes": mix.boxes, "rows": len(order),
        "file": _fingerprint("rows", out), "sources": told,
    }  # fmt: skip
    with replacing(out.with_name(out.name + ".manifest.json")) as file:
        file.write(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _rows(
    store: sqlite3.Connection, reader: Reader, given: ReaderInput, name: str
) -> Iterator[dict[str, Any]]:
    """The rows of one source: units of the same picture and part together, in order of first appearance."""
    firsts: dict[tuple[str | None, int], int] = {}
    for number, unit in enumerate(_units(reader, given, name)):
        first = firsts.setdefault((unit.image, unit.part), len(firsts)) if reader.merge else number
        values = (first, number, unit.image, json.dumps(unit.turns, ensure_ascii=False))
        store.execute("INSERT INTO units VALUES (?, ?, ?, ?)", values)
    units = store.execute("SELECT first, image, turns FROM units ORDER BY first, number")
    for (first, image), group in groupby(units, key=itemgetter(0, 1)):
        turns = [turn for _, _, text in group for turn in json.loads(text)]
        row_id = f"{name}/{PurePosixPath(image).stem}-{first}" if reader.merge else f"{name}/{first}"
        picture = {} if image is None else {"image": image}
        said = conversations(turns, reader.suffix, has_picture=image is not None)
        yield {"id": row_id, **picture, "conversations": said}
    store.execute("DELETE FROM units")


def _units(reader: Reader, given: ReaderInput, name: str) -> Iterator[Unit]:
    with official(lambda: f"{name}, entry {given.items}"):
        yield from reader.read(given)


def _sample(available: int, source: MixSource, random: np.random.Generator, name: str) -> np.ndarray:
    """Which rows are taken, as numbers from 0: every one so often, and a random part once more."""
    if source.rows is not None:
        if source.rows > available:
            raise InputError(
                f"{name}: {counted(source.rows, 'row', 'are')} asked for, its files give {available}; ask "
                "for fewer"
            )
        return np.sort(random.permutation(available)[: source.rows])
    target_rows = math.floor(available * source.weight + 0.5)
    if not target_rows:
        raise InputError(
            f"{name}: the weight {source.weight} of {counted(available, 'row')} takes none; raise it"
        )
    full_passes, extra_rows = divmod(target_rows, available)
    return np.concatenate(
        [np.tile(np.arange(available), full_passes), np.sort(random.permutation(available)[:extra_rows])]
    )


def _reference(reader: Reader, entries: int, available: int, name: str) -> dict[str, Any]:
    """LLaVA-1.5's count beside ours; a sentence when the full files are given and the two must agree."""
    full = reader.full is not None and entries == reader.full
    wrong = full and reader.exact and available != reader.rows
    sentence = (
        f"{name}: the {entries:,} entries of the full file give {available:,} rows, LLaVA-1.5 has "
        f"{reader.rows:,}; the files are not the ones it was made from"
        if wrong
        else ""
    )
    return {"rows": reader.rows, "full": full, "sentence": sentence}


def _write(store: sqlite3.Connection, order: np.ndarray, out: Path) -> None:
    as_list = out.suffix == ".json"
    with replacing(out) as file:
        occurrences = np.zeros(int(order.max()) + 1, np.int32)
        for place, number in enumerate(order.tolist()):
            (text,) = store.execute("SELECT row FROM rows WHERE number = ?", (number,)).fetchone()
            if occurrences[number]:  # a row that is taken twice keeps its id unique
                row = json.loads(text)
                text = json.dumps({**row, "id": f"{row['id']}+{occurrences[number]}"}, ensure_ascii=False)
            occurrences[number] += 1
            file.write(
                (("[\n" if place == 0 else ",\n") if as_list else "") + text + ("" if as_list else "\n")
            )
        file.write("\n]\n" if as_list else "")


def _fingerprint(role: str, file: Path) -> dict[str, Any]:
    return {"role": role, "file": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)}
