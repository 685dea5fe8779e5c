"""projects/pumice-tiny/shrink.py: the mean of several runs, with the stages of all."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from pumice.errors import InputError
from pumice.formats.pumice.folder import CONFIG, PROVENANCE, WEIGHTS, open_parts


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


def test_tensors_of_another_shape_are_refused(shrink: ModuleType, runs: list[Path]) -> None:
    tensors = load_file(runs[1] / WEIGHTS)
    name = next(iter(tensors))
    save_file({**tensors, name: torch.zeros(2)}, runs[1] / WEIGHTS)
    with pytest.raises(InputError, match=r"two' has other tensors than"):
        shrink.mean(runs)


def test_weights_of_another_meaning_are_refused(shrink: ModuleType, stand_in: Path, tmp_path: Path) -> None:
    """With another alpha the same LoRA adds something else. Dropout is nothing once the run has ended."""
    config = json.loads((stand_in / CONFIG).read_text())
    folders = [stand_in]
    for name, change in (("dropped", {"dropout": 0.1}), ("louder", {"alpha": 64.0})):
        folders.append(Path(shutil.copytree(stand_in, tmp_path / name)))
        changed = config | {"lora": config["lora"] | change}
        (folders[-1] / CONFIG).write_text(json.dumps(changed))
    shrink.mean(folders[:2])
    with pytest.raises(InputError, match=r"louder' has other settings of its parts than"):
        shrink.mean(folders)


def test_a_part_that_one_run_has_trained_is_stored(
    shrink: ModuleType, runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever comes first; also of a model that says nothing of its stages and brings its tokenizer."""
    (runs[0] / PROVENANCE).write_text("{}")
    wheels = {runs[0]: {"tower": "efficientnet-lite2"}, runs[1]: {}}
    monkeypatch.setattr(
        shrink, "open_parts", lambda source: dataclasses.replace(open_parts(source), parts=wheels[source])
    )
    shrink.shrink(runs, tmp_path / "kept")
    kept = open_parts(tmp_path / "kept")
    assert kept.parts == {} and kept.provenance == {"stages": ["beginning", "two"]}
    assert kept.state.keys() == load_file(runs[0] / WEIGHTS).keys()
    assert kept.tokenizer.to_str() == open_parts(runs[0]).tokenizer.to_str()
