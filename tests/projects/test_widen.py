"""projects/pumice-tiny/widen.py: with finer features a model computes at first what it computed before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pumice.errors import InputError
from pumice.formats.pumice.folder import open_parts
from pumice.model.llava import Llava
from pumice.storage.parts import LoadedParts


@pytest.fixture(scope="module")
def widen(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("widen")


def connect(parts: LoadedParts, pixels: torch.Tensor) -> torch.Tensor:
    model = Llava(parts.config).eval()
    model.load_state_dict({name: torch.as_tensor(tensor) for name, tensor in parts.state.items()})
    with torch.no_grad():
        return model.connect(model.tower(pixels))


def test_a_wider_model_begins_with_the_same_function(widen: ModuleType, tiny_folder: Path) -> None:
    narrow = open_parts(tiny_folder)
    assert narrow.config.vision is not None
    size = narrow.config.vision.image_size
    pixels = torch.randn(2, 3, size, size)
    wide = widen.widen(narrow, size)
    assert wide.config.vision is not None and wide.config.vision.width > 1280
    state = {name: stored.read(torch.float32) for name, stored in narrow.state.items()}
    before = connect(dataclasses.replace(narrow, state=state), pixels)
    torch.testing.assert_close(connect(wide, pixels), before)
    fine = wide.state[widen.FIRST].unflatten(1, (-1, wide.config.vision.width))[:, :, 1280:]
    assert fine.numel() and not fine.any()


def test_a_connector_without_layers_is_refused(widen: ModuleType, tiny_folder: Path) -> None:
    narrow = open_parts(tiny_folder)
    state = {name: tensor for name, tensor in narrow.state.items() if not name.startswith("connector.")}
    with pytest.raises(InputError, match="has no layer that could be widened"):
        widen.widen(dataclasses.replace(narrow, state=state), 64)


def test_finer_features_are_not_added_twice(widen: ModuleType, tiny_folder: Path) -> None:
    with pytest.raises(InputError, match="needs an EfficientNet-Lite tower without finer features"):
        widen.widen(widen.widen(open_parts(tiny_folder), 64), 64)
