"""projects/pumice-tiny/tune_tower.py: the tower's end learns what photographs show, and only that changes."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from pumice.errors import InputError
from pumice.formats.load import open_model
from pumice.formats.pumice import folder
from pumice.formats.pumice.folder import open_parts

COLOURS = {"cat": (250, 20, 20), "dog": (20, 20, 250)}


@pytest.fixture(scope="module")
def tuning(script: Callable[[str], ModuleType]) -> Iterator[ModuleType]:
    module = script("tune_tower")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BATCH", 4)
        patch.setattr(module, "RARE", 2)
        patch.setattr(module, "RATES", {"tower": 1e-3, "heads": 0.1})
        yield module


@pytest.fixture(scope="module")
def wide(script: Callable[[str], ModuleType], tiny_folder: Path, tmp_path_factory: Any) -> Path:
    """The tiny model with finer features."""
    target = tmp_path_factory.mktemp("wide") / "model"
    source = open_parts(tiny_folder)
    made = script("widen").widen(source, 64)
    folder.save(target, made.config, made.state, tokenizer=source.tokenizer.to_str())
    return target


@pytest.fixture
def parts(tuning: ModuleType, tmp_path: Path) -> Any:
    """Photographs of one colour for each category: 12 to learn from, and 4 held out."""
    scenes = []
    for number in range(16):
        name = list(COLOURS)[number % 2]
        Image.new("RGB", (48, 48), COLOURS[name]).save(tmp_path / f"{number}.png")
        photo = sys.modules[tuning.Scene.__module__].Photo(str(number), f"{number}.png", ())
        captions = (f"A {name} sleeps.",) if number % 4 else ()
        scenes.append(tuning.Scene(photo, frozenset({name}), None, (), (), captions))
    return scenes[:12], scenes[12:]


def test_photographs_of_both_sets_are_learnt_from(tuning: ModuleType, tmp_path: Path) -> None:
    """Those held out are the ones that nothing else learns from; Flickr8k's have no categories."""
    with pytest.raises(InputError, match="has no folder coco, whose categories"):
        tuning.photographs(tmp_path)
    for name, held in (("coco", 400), ("flickr8k", 500)):
        (tmp_path / name).mkdir()
        files = [{"id": n, "file_name": f"{n}.jpg"} for n in range(held + 2)]
        captions = [{"image_id": n, "caption": f"a dog sleeps on bed {n}"} for n in range(held + 2)]
        written = {"images": files, "annotations": captions}
        (tmp_path / name / "captions.json").write_text(json.dumps(written))
    (tmp_path / "coco" / "labels.jsonl").write_text(
        "".join(json.dumps({"image": f"{n}.jpg", "labels": ["dog"]}) + "\n" for n in range(402))
    )
    for name in ("objects", "vqa", "vsr"):
        (tmp_path / "coco" / f"{name}.jsonl").touch()
    learnt, held = tuning.photographs(tmp_path)
    known = [[scene.labels for scene in part] for part in (learnt, held)]
    assert known[0] == [{"dog"}] * 2 + [None] * 2 and known[1] == [{"dog"}] * 400 + [None] * 500
    photos = tuning.flickr.read_photos(tmp_path)
    names = {photo.image for photo in tuning.flickr.split(photos)[1]}
    assert {scene.photo.image for scene in held if scene.labels is None} == names
    last = learnt[-1]
    number = last.photo.name
    assert last.photo.image == f"flickr8k/images/{number}.jpg"
    assert last.raw_captions == (f"a dog sleeps on bed {number}",)


def test_the_end_of_the_tower_learns(tuning: ModuleType, wide: Path, parts: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    random.seed(0)
    opened = open_model(wide, merge=False)
    before = {name: tensor.clone() for name, tensor in opened.model.tower.state_dict().items()}
    losses = tuning.learn(opened, parts, tmp_path, tmp_path, epochs=6)
    assert len(losses) == 6 and losses[-1] < 0.75 * losses[0]
    changed = {n for n, t in opened.model.tower.state_dict().items() if not torch.equal(t, before[n])}
    first = opened.model.tower.fine + 1
    assert changed and all(before[name].shape[2:] == (1, 1) for name in changed)
    assert all(name.startswith("head.") or int(name.split(".")[1]) >= first for name in changed)
    # The folder holds the tower as it is now, and needs no wheel for it.
    tuning.save(opened, tmp_path / "tuned", {"seed": 0})
    again = open_model(tmp_path / "tuned", merge=False)
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(again.model.features(pixels), opened.model.features(pixels))
    assert again.loaded.parts == {} and again.provenance["stages"] == [{"seed": 0}]


def test_what_nobody_said_is_not_learnt(tuning: ModuleType, parts: Any) -> None:
    categories = list(tuning.CATEGORIES)
    table = tuning.targets(parts[0][:2], ["sleeps", "runs"])
    assert table[:, categories.index("cat")].tolist() == [1, 0]
    assert table[0, -2:].isnan().all() and table[1, -2:].tolist() == [1, 0]
    scores = torch.zeros(2, len(categories)), torch.zeros(2, table.shape[1])
    known = (~table[:, : len(categories)].isnan()).sum() + (~table.isnan()).sum()
    assert tuning.loss(scores, table).item() == pytest.approx(known.item() * 0.6931 / 2, rel=1e-3)


def test_a_target_that_cannot_be_written_is_refused_first(
    tuning: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for target in (tmp_path / "file", tmp_path / "no folder" / "model"):
        arguments = ["tune_tower.py", str(tmp_path / "no model"), str(target), "--photos", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(InputError, match=f"'{target}' is a file, or its folder does not exist"):
            tuning.main()


def test_what_cannot_be_tuned_is_refused(
    tuning: ModuleType, wide: Path, tiny_folder: Path, parts: Any, tmp_path: Path
) -> None:
    opened = open_model(wide, merge=False)
    for few in ([], []), (parts[0][:3], parts[1]), (parts[0], []):
        message = f"there are {len(few[0])} photographs to learn from and {len(few[1])} held out; 4 and 1"
        with pytest.raises(InputError, match=message):
            tuning.learn(opened, few, tmp_path, tmp_path, epochs=1)
    with pytest.raises(InputError, match=r"needs finer features, as widen\.py gives them"):
        tuning.learn(open_model(tiny_folder, merge=False), parts, tmp_path, tmp_path, epochs=1)
