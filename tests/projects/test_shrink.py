"""projects/pumice-tiny/shrink.py: the mean of several runs, with the stages of all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from pumice.errors import InputError
from pumice.formats.pumice.folder import PROVENANCE, WEIGHTS


@pytest.fixture(scope="module")
def shrink(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("shrink")


@pytest.fixture
def runs(tiny_folder: Path, tmp_path: Path) -> list[Path]:
    """Two runs of one beginning: the second one's weights are three times the first one's."""
    folders = []
    for scale, name in ((1, "one"), (3, "two")):
        folder = tmp_path / name
        shutil.copytree(tiny_folder, folder)
        tensors = load_file(folder / WEIGHTS)
        save_file({key: scale * tensor for key, tensor in tensors.items()}, folder / WEIGHTS)
        (folder / PROVENANCE).write_text(json.dumps({"stages": ["beginning", name]}))
        folders.append(folder)
    return folders


def test_the_mean_of_weights_and_the_stages_of_all(shrink: ModuleType, runs: list[Path]) -> None:
    averaged, before = shrink.mean(runs), load_file(runs[0] / WEIGHTS)
    assert averaged.state.keys() == before.keys()
    for name, tensor in averaged.state.items():
        assert tensor.dtype == torch.float16
        torch.testing.assert_close(tensor, (2 * before[name]).half())
    assert averaged.provenance == {"stages": ["beginning", "one", "two"]}


def test_other_tensors_are_refused(shrink: ModuleType, runs: list[Path]) -> None:
    tensors = load_file(runs[1] / WEIGHTS)
    save_file({**tensors, "more": torch.zeros(2)}, runs[1] / WEIGHTS)
    with pytest.raises(InputError, match=r"two' has other tensors than"):
        shrink.mean(runs)
