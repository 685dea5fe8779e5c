"""Twenty-four rows about twelve pictures, and how they are written."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pumice.data.rows import Rows

CLASSES = ("cat", "dog", "bird")


@dataclass(frozen=True)
class Example:
    id: str
    image: str
    question: str
    answer: str


@dataclass(frozen=True)
class Examples:
    """The rows, and the folder of their pictures."""

    folder: Path
    rows: Sequence[Example]

    def bytes_of(self, row: Example) -> bytes:
        return (self.folder / row.image).read_bytes()


def noise(number: int) -> Image.Image:
    """A picture that is unlike the others, also to a perceptual hash."""
    small = Image.frombytes(
        "RGB", (6, 5), bytes((number * 7919 + n * n * 31 + n * 97) % 256 for n in range(90))
    )
    return small.resize((24 + number, 20), Image.Resampling.BICUBIC)


def llava(rows: Sequence[Example], path: Path) -> Rows:
    """The rows as LLaVA JSON, which every other format is compared with."""
    values = [
        {
            "id": row.id,
            "image": row.image,
            "conversations": turns(row, ("human", "gpt")),
        }
        for row in rows
    ]
    path.write_text(json.dumps(values), "utf-8")
    return Rows(path)


def jsonl(path: Path, values: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), "utf-8")
    return path


def turns(row: Example, speakers: tuple[str, str], image: str = "<image>\n") -> list[dict[str, str]]:
    texts = (f"{image}{row.question}", row.answer)
    return [{"from": s, "value": t} for s, t in zip(speakers, texts, strict=True)]


def dialogue(question: Any, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def nested(e: Examples) -> list[dict[str, Any]]:
    return [
        {
            "id": r.id,
            "image": {"bytes": e.bytes_of(r), "path": "same.png"},
            "conversations": turns(r, ("human", "gpt")),
        }
        for r in e.rows
    ]


def asked_about(e: Examples, **more: Any) -> list[dict[str, Any]]:
    return [{"id": r.id, "image": r.image, "question": r.question, "answer": r.answer} | more for r in e.rows]


def pack(path: Path, files: Mapping[str, bytes]) -> Path:
    """Write a tar of files by their names."""
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    noise(number).save(buffer, "PNG")
    return buffer.getvalue()


def make_examples(tmp_path: Path) -> Examples:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(12):
        noise(number).save(folder / f"{number:02}.png")
    rows = [
        Example(
            f"r{n}",
            f"{n // 2:02}.png",
            f"What is {n}?\nSay it, “shortly”.",
            f"A {CLASSES[n % 3]}, {n}\U0001f415.",
        )
        for n in range(24)
    ]
    return Examples(folder, rows)


CRASHES = 99


def double(numbers: Sequence[int]) -> list[int]:
    """Work for processes, which import it from here. `CRASHES` ends one as a crashing decoder does."""
    if CRASHES in numbers:
        os._exit(1)
    return [2 * number for number in numbers]
