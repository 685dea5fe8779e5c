"""EfficientNet-Lite checkpoints: names, strictness, no pickled code."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pumice.config import VisionConfig
from pumice.errors import InputError
from pumice.model.efficientnet import EfficientNetLite
from pumice.weights import keymaps, parts
from pumice.weights.folder import check
from pumice.weights.tower import load_efficientnet_lite


def published(depth: int = 21) -> dict[str, Tensor]:
    """A checkpoint as it is published: every key, one value each."""
    return {name: torch.full((1,), float(i)) for i, name in enumerate(keymaps.efficientnet_lite(depth))}


def test_names_are_those_of_our_tower(tmp_path: Path) -> None:
    torch.save(published(), tmp_path / "t.pth")
    state = load_efficientnet_lite(tmp_path / "t.pth")
    with torch.device("meta"):
        ours = EfficientNetLite(VisionConfig()).state_dict()
    assert state.keys() == {name for name in ours if not name.endswith("num_batches_tracked")}
    source = published()
    assert state["stem.norm.bias"] == source["_bn0.bias"]
    assert state["head.norm.bias"] == source["_bn1.bias"]
    assert state["blocks.3.depthwise.norm.running_var"] == source["_blocks.3._bn1.running_var"]
    assert state["blocks.0.project.conv.weight"] == source["_blocks.0._project_conv.weight"]


@pytest.mark.parametrize("name", ["_blocks.4._expand_conv.weight", "_bn0.running_mean"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    state = published()
    del state[name]
    torch.save(state, tmp_path / "t.pth")
    with pytest.raises(InputError, match=f"missing {name}$"):
        load_efficientnet_lite(tmp_path / "t.pth")


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    torch.save(published() | {"_blocks.0._se_reduce.weight": torch.zeros(1)}, tmp_path / "t.pth")
    with pytest.raises(InputError, match=r"unknown _blocks\.0\._se_reduce\.weight$"):
        load_efficientnet_lite(tmp_path / "t.pth")


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (Path("harm"),))


def test_pickled_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.pth").write_bytes(pickle.dumps({"_fc.bias": Harmful()}, protocol=2))
    with pytest.raises(InputError, match="cannot read the vision tower"):
        load_efficientnet_lite(tmp_path / "t.pth")
    torch.save({"_fc.bias": Harmful()}, tmp_path / "t.pth")
    with pytest.raises(InputError, match="cannot read the vision tower"):
        load_efficientnet_lite(tmp_path / "t.pth")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_unreadable_files(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "t.pth").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot read the vision tower .*t\.pth"):
        load_efficientnet_lite(tmp_path / "t.pth")


def test_the_published_tower_fits() -> None:
    part = parts.WHEELS["efficientnet-lite2"]
    path = part.folder / Path(part.member).name
    if not path.exists():
        pytest.skip("EfficientNet-Lite2 is not in the cache; `pumice ask` fetches it")
    tower = EfficientNetLite(VisionConfig())
    state = load_efficientnet_lite(path)
    check(state, {name: value.shape for name, value in tower.state_dict().items()}, str(path))
    tower.load_state_dict(state)
    assert tower(torch.zeros(1, 3, 256, 256)).shape == (1, 64, 1280)
