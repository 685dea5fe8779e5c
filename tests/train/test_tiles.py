"""Pictures of several tiles, and several pictures of one row, are learned alike however they are computed."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from outcomes import losses, weights
from PIL import Image

from pumice.config import ImagePolicy
from pumice.conversation import Conversation, user_message
from pumice.data.packing import Pack
from pumice.engine.generate import naive_generate
from pumice.engine.requests import Prompt
from pumice.formats.load import open_model
from pumice.formats.pumice.folder import save
from pumice.train import run
from pumice.train.loop import Trainer
from pumice.train.recipe import load_recipe
from pumice.train.setup import prepare

MakeRecipe = Callable[..., Path]
TILED = ImagePolicy("anyres", resample="bilinear", pinpoints=((64, 128), (128, 64), (128, 128)))


@pytest.fixture
def tiled_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model, which cuts its pictures into tiles."""
    opened = open_model(tiny_model)
    config = dataclasses.replace(opened.model.config, image=TILED)
    state = opened.model.state_dict() | {"image_newline": torch.randn(config.decoder.width) * 0.1}
    save(tmp_path / "tiled", config, state, tokenizer=opened.processor.tokenizer.backend.to_str())
    return tmp_path / "tiled"


@pytest.fixture
def wide_rows(rows: Path, tmp_path: Path) -> Path:
    """The rows again, each picture of another shape."""
    folder = tmp_path / "wide"
    folder.mkdir()
    for path in rows.glob("*.png"):
        number = int(path.stem)
        with Image.open(path) as picture:
            picture.resize((40 + 30 * number, 100 - 20 * number)).save(folder / path.name)
    (folder / "rows.jsonl").write_text((rows / "rows.jsonl").read_text())
    return folder


def test_tiles_are_learned_alike_with_and_without_a_cache(
    make_recipe: MakeRecipe, tiled_model: Path, wide_rows: Path, tmp_path: Path
) -> None:
    data = [{"rows": str(wide_rows / "rows.jsonl"), "mirror": True}]
    changes = {"model": str(tiled_model), "data": data, "pictures": [str(wide_rows)], "held_out": data}
    first = run(make_recipe("plain", **changes))
    second = run(make_recipe("cached", feature_cache=str(tmp_path / "cache"), **changes))
    golden, cached = losses(tmp_path / "plain"), losses(tmp_path / "cached")
    assert golden[-1] < 0.7 * golden[0]
    assert cached == pytest.approx(golden, rel=5e-3)  # measured worst case: 1e-4; the cache keeps bf16
    before, after = weights(tiled_model), weights(first)
    assert not torch.equal(before["image_newline"], after["image_newline"])
    cached_keys = {line.split(" ")[0] for line in (tmp_path / "cache" / "keys.txt").read_text().splitlines()}
    assert len(cached_keys) > 4 and any(
        key.endswith("-mirror") for key in cached_keys
    )  # upright and mirrored
    # What was trained answers through the same path.
    opened = open_model(second)
    question = Conversation((user_message("left?", [wide_rows / "1.png"]),))
    sample = opened.processor.prompt(question)
    with torch.no_grad():
        pixels = torch.from_numpy(opened.processor.pixels(sample.images, sample.layouts))
        tokens = opened.model.encode(pixels, sample.layouts)
    assert len(tokens) == sample.layouts[0].tokens > 8
    assert naive_generate(opened.model, Prompt(torch.from_numpy(sample.input_ids), tokens))


def test_several_pictures_are_learned_alike_with_and_without_a_cache(
    make_recipe: MakeRecipe, tiled_model: Path, wide_rows: Path, tmp_path: Path
) -> None:
    config = tiled_model / "config.json"
    values = json.loads(config.read_text())
    values["image"]["several"] = "square"
    config.write_text(json.dumps(values))
    lines = [json.loads(line) for line in (wide_rows / "rows.jsonl").read_text().splitlines()]
    for first, second in itertools.pairwise(lines[::2]):  # some pictures stand alone in other rows, in tiles
        first["image"] = [first["image"], second["image"]]
        first["conversations"][0]["value"] = "<image>" + first["conversations"][0]["value"]
    (wide_rows / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = [{"rows": str(wide_rows / "rows.jsonl")}]
    changes = {"model": str(tiled_model), "data": data, "pictures": [str(wide_rows)], "held_out": data}
    first_run = run(make_recipe("plain", **changes))
    run(make_recipe("cached", feature_cache=str(tmp_path / "cache"), **changes))
    golden, cached = losses(tmp_path / "plain"), losses(tmp_path / "cached")
    assert golden[-1] < 0.8 * golden[0]
    assert cached == pytest.approx(golden, rel=5e-3)  # measured worst case: 5e-4; the cache keeps bf16
    cached_keys = {line.split(" ")[0] for line in (tmp_path / "cache" / "keys.txt").read_text().splitlines()}
    assert {key.partition("-")[2] for key in cached_keys} == {"", "square"}
    assert any(f"{key}-square" in cached_keys for key in cached_keys)
    trained = json.loads((first_run / "config.json").read_text())
    assert (trained["image"]["several"], trained["trained_pictures"]) == ("square", None)


@pytest.mark.parametrize(
    ("before", "max_memory", "after"), [(0, 1, 1), (1, 3, 3), (4, 1, 4), (None, 1, None), (None, 3, 3)]
)
def test_a_model_knows_the_most_pictures_that_it_was_trained_on(
    make_recipe: MakeRecipe, tiny_model: Path, before: int | None, max_memory: int, after: int | None
) -> None:
    setup = prepare(load_recipe(make_recipe(model=str(tiny_model))))
    setup.model.config = dataclasses.replace(setup.model.config, trained_pictures=before)
    setup.record_max_images(max_memory)
    assert setup.model.config.trained_pictures == after


def test_a_packed_batch_of_tiles_has_the_losses_of_its_rows(
    make_recipe: MakeRecipe, tiled_model: Path, wide_rows: Path
) -> None:
    changes = {
        "model": str(tiled_model), "pictures": [str(wide_rows)], "batch": 4, "pack_tokens": 400,
        "data": [{"rows": str(wide_rows / "rows.jsonl")}],
    }  # fmt: skip
    recipe = load_recipe(make_recipe(**changes))
    setup = prepare(recipe)
    trainer = Trainer(recipe, setup)
    [(packed, mirrored)] = trainer.batches[0].packs
    assert len(packed.layouts) == len(packed.trees) == 4
    assert len({layout.tokens for layout in packed.layouts}) > 2
    with torch.no_grad():
        together = trainer.objective(trainer._load_pack(packed, mirrored)).item()
        alone = sum(
            trainer.objective(trainer._load_pack(Pack.of((tree,)), [False])).item() for tree in packed.trees
        )
    assert together == pytest.approx(alone, rel=1e-5)
