"""Damaged files of every format that is read: each is read, or refused with one sentence, within bounds.

A process reads them, so that a crash, a loop or a flood of memory ends it and not the attack.
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from targets import (
    FEATURES,
    LEARNED,
    command,
    make_adapter,
    make_cache,
    make_model,
    make_pictures,
    make_predictions,
    make_recipe,
    make_rows,
    make_run,
    make_tables,
    make_videos,
    point,
)

CHAT_TEMPLATES = Path(__file__).parents[1] / "chat_templates"
SECONDS = 150.0  # for one file, on a busy machine
MEMORY = 6 << 30  # bytes of address space, most of it PyTorch's own

Read = tuple[str, str]  # how a file is read, and the file or folder to read


def read_one(how: str, path: str) -> str:
    """Read a file as Pumice does. Return "" or what is wrong; InputError is right."""
    from pumice.errors import InputError, WorkError

    try:
        READERS[how](Path(path))
    except (InputError, WorkError) as error:
        text = str(error)
        return "" if 0 < len(text) < 2000 else f"a message of {len(text)} characters"
    except RecursionError:
        return "RecursionError"
    except MemoryError:
        return "MemoryError"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def _model(path: Path) -> None:
    """Open a model as `load` does, and ask it."""
    import pumice

    pumice.load(path, device="cpu", quantize=None, cache_tokens=600).ask(None, "What?", max_new_tokens=2)


def _picture(path: Path) -> None:
    from pumice.images import open_image

    open_image(path)


def _rows(path: Path) -> None:
    from pumice.data.rows import Rows

    rows = Rows(path)
    for number in range(min(len(rows), 30)):
        rows[number]


def _recipe(path: Path) -> None:
    from pumice.train.recipe import load_recipe

    load_recipe(path)


def _archive(path: Path) -> None:
    from pumice.evaluate.archives import read_member

    read_member(path, "rows.jsonl")


def _table(path: Path) -> None:
    from pumice.evaluate.archives import read_table

    for _ in read_table(path):
        pass


def _predictions(path: Path) -> None:
    from pumice.evaluate.predictions import read_predictions

    read_predictions(path)


def _video(path: Path) -> None:
    from pumice.conversation import Video
    from pumice.media import VideoPolicy
    from pumice.video import read_frames

    read_frames(Video(path, 3), VideoPolicy())


def _template(path: Path) -> None:
    from pumice.formats.text.isolated import describe
    from pumice.storage.json_file import read_text

    tokens = ("<|im_start|>", "<|im_end|>")
    describe(read_text(path), bos=None, eos=tokens[1], specials=tokens, label=path.name)


def _run(path: Path) -> None:
    """Go on from the newest checkpoint, and read the metrics."""
    import torch

    from pumice.train import checkpoint as checkpoints
    from pumice.train.report import draw_loss

    expected = point(2)
    parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in LEARNED.items()}
    optimizer = torch.optim.AdamW(parameters.values())
    found = checkpoints.latest(path / "checkpoints", expected.recipe, parameters, torch.device("cpu"))
    assert found is not None, "the newest checkpoint is not seen"
    checkpoints.restore_optimizer(optimizer, parameters, found)
    same = [torch.equal(found.weights[name], expected.weights[name]) for name in LEARNED]
    assert all(same), "other weights than were written"
    draw_loss(path)


def _cache(path: Path) -> None:
    """Read all features: each is what was written, or is computed again."""
    import torch

    from pumice.train.features import FeatureCache

    cache = FeatureCache(path, "tower", 3, 2)
    try:
        for key, features in FEATURES.items():
            found = cache.read(key)
            assert found is None or torch.equal(found, features.bfloat16()), (
                "other features than were written"
            )
    finally:
        cache.close()


READERS: dict[str, Callable[[Path], None]] = {
    "model": _model, "picture": _picture, "rows": _rows, "recipe": _recipe, "archive": _archive,
    "table": _table, "predictions": _predictions, "video": _video, "template": _template, "run": _run,
    "cache": _cache,
}  # fmt: skip


def _reader(connection: Connection) -> None:
    """The process that reads."""
    import resource

    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    while True:
        connection.send(read_one(*connection.recv()))


class Reader:
    """A process that reads files one after the other. It is replaced when a file ends it."""

    def __init__(self) -> None:
        self._process: Any = None

    def read(self, how: str, path: Path) -> str:
        if self._process is None:
            here, there = multiprocessing.get_context("spawn").Pipe()
            self._process = multiprocessing.get_context("spawn").Process(
                target=_reader, args=(there,), daemon=True
            )
            self._process.start()
            there.close()
            self._connection = here
        self._connection.send((how, str(path)))
        try:
            if self._connection.poll(SECONDS):
                answer: str = self._connection.recv()
                return answer
            problem = f"no end within {SECONDS:g} s"
        except EOFError:
            self._process.join()
            problem = f"the process ended with {self._process.exitcode}"
        self.end()
        return problem

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


NUMBERS = (
    "0",
    "-1",
    "1e999",
    "9" * 5000,
    str(2**70),
    "null",
    "[]",
    "{}",
    '"x"',
    "true",
    "1.5",
    "NaN",
    '"' + "x" * 5000 + '"',
)


# What hostile texts are made of: JSON, YAML, Jinja.
PIECES = (
    "[" * 100_000, '{"a":' * 5000, "\\ud800", "\0", "\n", ": ", "- ", "&a [*a, *a]", "<<: *a", "!!int x",
    "!!python/name:os.system", "2025-02-30", "{% for i in range(10**9) %}{{ i }}{% endfor %}",
    "{{ 'x' * 8000000000 }}", "{{ ''.__class__.__mro__ }}", "{{ messages[9].a.b }}", "{% if", "{{", "}}",
    "{% set x = namespace(t='xx') %}{% for i in range(40) %}{% set x.t = x.t ~ x.t %}{% endfor %}",
    "{{ raise_exception('x' * 9999) }}", "{{ (((((1))))) / 0 }}",
)  # fmt: skip


def damage(draw: random.Random, data: bytes) -> bytes:
    """Return the bytes of a file with random damage."""
    if not data:
        return draw.randbytes(9)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = ""
    # 1. Text: replace a value, repeat or nest a part.
    if text and draw.random() < 0.7:
        values = list(
            re.finditer(r"-?\d+(\.\d+)?|\"[^\"]{0,80}\"|true|false|null|\[\]|\{\}", text[: 1 << 20])
        )
        if values and draw.random() < 0.8:
            chosen = draw.choice(values)
            return (text[: chosen.start()] + draw.choice(NUMBERS) + text[chosen.end() :]).encode()
        start = draw.randrange(len(text))
        if draw.random() < 0.5:
            return (text[:start] + draw.choice(PIECES) + text[start:]).encode()
        part = text[start : start + draw.randrange(200)]
        return (text[:start] + part * draw.choice((0, 2, 1000)) + text[start + len(part) :]).encode()
    # 2. Bytes: mostly of the beginning, where lengths and types are.
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        place = draw.randrange(draw.choice((min(64, len(changed)), min(2000, len(changed)), len(changed))))
        kind = draw.random()
        if kind < 0.4:
            changed[place] ^= 1 << draw.randrange(8)
        elif kind < 0.7:
            changed[place : place + 4] = draw.choice(
                (b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f", draw.randbytes(4))
            )
        elif kind < 0.8:
            changed[place:place] = draw.randbytes(draw.randrange(1, 20))
        elif kind < 0.9:
            del changed[place : place + draw.randrange(1, 50)]
        else:
            del changed[place + 1 :]
        if not changed:
            return b""
    return bytes(changed)


def attack(folder: Path) -> Iterator[Callable[[random.Random], str]]:
    """In turn: each file of models, adapters, runs and caches, pictures, videos, rows, tables and texts."""
    # 1. Make them.
    model, rows = make_model(folder / "model"), make_rows(folder / "rows")
    for form in ("hf", "llava", "gguf"):
        subprocess.run(command("export", model, folder / form, "--to", form), check=True, capture_output=True)
    tables = make_tables(folder / "tables", rows)
    folders = [("model", folder / form) for form in ("model", "hf", "llava", "gguf")]
    folders.append(("model", make_adapter(folder / "adapter", folder / "hf")))
    folders += [("run", make_run(folder / "run")), ("cache", make_cache(folder / "cache"))]
    files: list[tuple[str, Path, Path]] = [  # how it is read, the file to damage, what is read
        (how, file, whole) for how, whole in folders for file in sorted(whole.rglob("*")) if file.is_file()
    ]
    alone = [("picture", file) for file in make_pictures(folder / "pictures")]
    alone += [("video", file) for file in make_videos(folder / "videos")]
    alone += [("rows", file) for file in tables]
    alone += [("table", file) for file in tables if file.suffix == ".parquet"]
    alone += [("template", file) for file in sorted(CHAT_TEMPLATES.iterdir())]
    alone.append(("recipe", make_recipe(folder / "recipe.yaml", model, rows, folder / "out")))
    alone.append(("predictions", make_predictions(folder / "answers.jsonl")))
    alone.append(("archive", folder / "tables" / "a.zip"))
    files += [(how, file, file) for how, file in alone]
    # 2. Damage one after the other.
    reader = Reader()
    try:
        random.Random("files").shuffle(files)  # so that a short attack meets all kinds
        for how, file, whole in itertools.cycle(files):
            yield functools.partial(_damage, reader, folder / "damaged", how, file, whole)
    finally:
        reader.end()


def _damage(reader: Reader, place: Path, how: str, file: Path, whole: Path, draw: random.Random) -> str:
    shutil.rmtree(place, ignore_errors=True)
    if whole.is_dir():
        shutil.copytree(whole, place / "whole", symlinks=True)
        target = place / "whole" / file.relative_to(whole)
    else:
        place.mkdir()
        target = place / file.name
    target.write_bytes(damage(draw, file.read_bytes()))
    problem = reader.read(how, place / "whole" if whole.is_dir() else target)
    return problem and f"{how} {file.parent.name}/{file.name}: {json.dumps(problem)}"
