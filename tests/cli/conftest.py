"""The command line in a folder of its own, with a tiny model."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pumice.cli import app


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, the current one, with two pictures in it."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for name in ("a dog.png", "cat.png"):
        Image.fromarray(random.integers(0, 256, (40, 64, 3), np.uint8)).save(tmp_path / name)
    return tmp_path


@pytest.fixture
def clip(folder: Path) -> str:
    """The name of an animation of four frames in the folder."""
    first, *others = (Image.new("RGB", (20, 10), (60 * n, 0, 0)) for n in range(4))
    first.save(folder / "clip.gif", save_all=True, append_images=others, duration=100)
    return "clip.gif"


@pytest.fixture
def run(tiny_folder: Path) -> Any:
    def run(*arguments: str, stdin: str | None = None, model: bool = True) -> Any:
        chosen = ["--model", str(tiny_folder), "--device", "cpu"] if model else []
        return CliRunner().invoke(app, [arguments[0], *chosen, *arguments[1:]], input=stdin)

    return run


@pytest.fixture
def bad_pictures(folder: Path) -> Path:
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("this is no picture")
    png = (folder / "cat.png").read_bytes()
    (folder / "cut.png").write_bytes(png[: len(png) // 2])
    size = struct.pack(">II", 60000, 60000)
    (folder / "bomb.png").write_bytes(png[:16] + size + png[24:])
    (folder / "folder.jpg").mkdir()
    return folder


@pytest.fixture
def refused() -> Callable[[Any, str], None]:
    def refused(result: Any, message: str) -> None:
        """Status 2, nothing on stdout, one line with the message on stderr."""
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert message in result.stderr
        assert result.stderr.startswith("pumice: ")
        assert result.stderr.count("\n") == 1

    return refused
