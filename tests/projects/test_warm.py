"""projects/pumice-tiny/warm.py: words are told from pictures, and a stopped run goes on as if unbroken."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from pumice.errors import InputError
from pumice.train.recipe import Recipe
from pumice.train.setup import prepare

WORDS = {
    "is": (250, 20, 20),
    "system": (20, 250, 20),
    "picture": (20, 20, 250),
}  # one token each with its blank


@pytest.fixture(scope="module")
def warm(script: Callable[[str], ModuleType]) -> Iterator[ModuleType]:
    module = script("warm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "COMMON", "a")
        yield module


@pytest.fixture
def recipe(tiny_folder: Path, tmp_path: Path) -> Any:
    """Pictures of one colour for each word, 12 to learn from and 3 held out."""
    for part, count in (("train", 12), ("val", 3)):
        rows = []
        for number in range(count):
            word = list(WORDS)[number % 3]
            name = f"{part}{number}.png"
            Image.new("RGB", (32, 32), WORDS[word]).save(tmp_path / name)
            turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"A {word}."}]
            rows.append({"id": name, "image": name, "conversations": turns})
        (tmp_path / f"{part}.json").write_text(json.dumps(rows))

    def make_recipe(**changes: Any) -> Recipe:
        values: dict[str, Any] = {
            "name": "warm", "output": tmp_path / "out", "model": tiny_folder,
            "stage": {"learn": {"connector": 1e-3}}, "data": [{"rows": tmp_path / "train.json"}],
            "held_out": [{"rows": tmp_path / "val.json"}], "pictures": [tmp_path],
            "epochs": 10, "batch": 6, "precision": "fp32",
        }  # fmt: skip
        return Recipe.model_validate(values | changes)

    return make_recipe


class Colours(torch.nn.Module):
    """A tower whose every feature is the picture's mean colour."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.features, self.width = features, width
        self.weight = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        colour = pixels.mean((2, 3)).repeat(1, self.width // 3 + 1)[:, : self.width]
        return colour[:, None].expand(-1, self.features, -1)


def run(warm: ModuleType, recipe: Recipe) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    setup = prepare(recipe)
    setup.model.tower = Colours(setup.model.config.vision.features, setup.model.config.vision.width)
    means = warm.warm(setup, recipe)
    return means, {name: p.detach().clone() for name, p in setup.model.connector.named_parameters()}


def test_words_are_told_from_pictures(warm: ModuleType, recipe: Any, capsys: Any) -> None:
    means, _ = run(warm, recipe())
    assert len(means) == 10 and means[-1] < means[0] - 0.3
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    losses = [float(line.rpartition(" ")[2]) for line in lines]
    assert len(losses) == 10 and losses[-1] < 0.5  # 1.1 without the picture


def test_fewer_pictures_than_a_batch_are_refused(warm: ModuleType, recipe: Any) -> None:
    with pytest.raises(InputError, match="the rows show 12 pictures, fewer than the batch of 13"):
        run(warm, recipe(batch=13))


def test_a_stopped_run_goes_on_as_if_unbroken(
    warm: ModuleType, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_run = run(warm, recipe())
    again = recipe(output=tmp_path / "again")
    keep_epoch = warm.keep

    def keep_and_stop(path: Path, *state: Any) -> None:
        keep_epoch(path, *state)
        if len(state[-1]) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(warm, "keep", keep_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run(warm, again)
    monkeypatch.undo()
    means, weights = run(warm, again)
    assert means == full_run[0]
    assert all(torch.equal(weights[name], full_run[1][name]) for name in weights)
    with pytest.raises(InputError, match="is of another recipe; remove it or name another output"):
        run(warm, recipe(output=tmp_path / "again", seed=1))
