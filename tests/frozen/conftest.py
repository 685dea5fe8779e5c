"""Lets the tests import `stored`, and gives them a copy of the stored working folder."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a copy of `files`, where every run was stopped half way."""
    folder = tmp_path / "work"
    shutil.copytree(Path(__file__).parent / "files", folder)
    monkeypatch.chdir(folder)
    return folder
