"""Trainings that are killed go on as if they were not; a full disk leaves one sentence and no half file."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors.numpy import load_file
from targets import command, make_model, make_recipe, make_rows

LIMIT = 240  # seconds of one command on a busy machine


def _train(recipe: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command("train", recipe), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _weights(output: Path) -> dict[str, bytes]:
    return {
        name: tensor.tobytes() for name, tensor in load_file(output / "model" / "model.safetensors").items()
    }


def kill(folder: Path) -> Iterator[Callable[[random.Random], str]]:
    """kill -9 at a random moment, once or more often, then the same command to its end."""
    model, rows = make_model(folder / "model"), make_rows(folder / "rows")
    whole = folder / "whole"
    begun = time.monotonic()
    process = _train(make_recipe(folder / "whole.yaml", model, rows, whole))
    message = process.communicate(timeout=LIMIT)[1]
    assert process.returncode == 0, message
    seconds, expected = time.monotonic() - begun, _weights(whole)
    for number in range(sys.maxsize):
        output = folder / f"killed-{number}"
        recipe = make_recipe(folder / f"killed-{number}.yaml", model, rows, output)
        yield functools.partial(_killed, recipe, output, expected, seconds)


def _killed(
    recipe: Path, output: Path, expected: dict[str, bytes], seconds: float, draw: random.Random
) -> str:
    for _ in range(draw.choice((1, 2, 3))):
        process = _train(recipe)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=draw.uniform(0.3, 1.0) * seconds)
        process.kill()
        process.communicate()
    process = _train(recipe)
    message = process.communicate(timeout=LIMIT)[1].decode()
    if process.returncode:
        return f"status {process.returncode}: {message[-300:]}"
    return "" if _weights(output) == expected else "other weights than without a kill"


def _small_disk(folder: Path) -> bool:
    """Mount a disk of a megabyte. Return False where that is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(folder)]
    try:
        return subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def fill_disk(folder: Path) -> Iterator[Callable[[random.Random], str]]:
    """Commands write to a disk with room for a part of it. Without mounts, files have a limit of size."""
    model, rows = make_model(folder / "model"), make_rows(folder / "rows")
    disk = folder / "disk"
    mounted = _small_disk(disk)
    try:
        while True:
            yield functools.partial(_full, model, rows, disk, mounted)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(disk)], check=False)


def _full(model: Path, rows: Path, disk: Path, mounted: bool, draw: random.Random) -> str:
    # 1. Leave a random room.
    for path in sorted(disk.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    room = draw.randrange(1 << 19)
    if mounted:
        (disk / "filler").write_bytes(bytes((1 << 20) - (1 << 12) - room))
    # 2. Write.
    out = disk / "out"
    form = draw.choice(("hf", "llava", "gguf"))
    arguments = draw.choice((
        command("export", model, out, "--to", form),
        command("import", model, out),
        command("train", make_recipe(rows.parent.parent / "full.yaml", model, rows, out)),
        command("data", "convert", rows, out, "--to", "parquet", "--images", rows.parent),
    ))  # fmt: skip
    if not mounted:
        code = "import resource, os, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)"
        arguments = [
            sys.executable,
            "-c",
            f"{code}; os.execv(sys.argv[2], sys.argv[2:])",
            str(room),
            *arguments,
        ]
    process = subprocess.run(arguments, capture_output=True, text=True, timeout=LIMIT, check=False)
    # 3. One sentence, and nothing that looks complete.
    name = " ".join(arguments[3:5])
    if process.returncode == 0:
        return ""
    if process.returncode not in (1, 2):
        return f"{name}: status {process.returncode}: {process.stderr[-300:]}"
    if "Traceback" in process.stderr or not process.stderr.strip():
        return f"{name}: {process.stderr[-300:]}"
    manifest = out / "manifest.json"
    if manifest.exists():
        try:
            listed = json.loads(manifest.read_text() or "{}").get("files", {})
        except ValueError:
            return f"{name}: half a manifest"
        missing = [file for file in listed if not (out / file).exists()]
        if missing:
            return f"{name}: a manifest without its files {missing}"
    return ""
