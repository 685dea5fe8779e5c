"""What a step sees: kinds kept apart on demand, rows prepared ahead in order, doomed runs refused."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pumice.errors import InputError
from pumice.formats.load import open_model
from pumice.train import run
from pumice.train.batches import Batches, prefetch
from pumice.train.preflight import check_disk, check_image_tokens
from pumice.train.recipe import load_recipe
from pumice.train.report import read_metrics
from pumice.train.setup import prepare
from pumice.train.shapes import read_parts
from pumice.train.sizes import sizes

MakeRecipe = Callable[..., Path]


@pytest.fixture
def mixed(rows: Path, tmp_path: Path) -> Path:
    """The eight rows with pictures, and five of text alone."""
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "red"}]
    text = [json.dumps({"id": f"t{n}", "conversations": turns}) for n in range(5)]
    path = tmp_path / "mixed.jsonl"
    path.write_text((rows / "rows.jsonl").read_text() + "\n".join(text) + "\n")
    return path


def test_length_grouped_steps_show_pictures_in_all_rows_or_none(make_recipe: MakeRecipe, mixed: Path) -> None:
    recipe = load_recipe(
        make_recipe(data=[{"rows": str(mixed)}], order="length_grouped", batch=3, epochs=1, pack_tokens=9999)
    )
    batches = Batches(recipe, prepare(recipe).processor)
    assert batches.steps == 5  # 2 of pictures, 1 of text, and 2 + 2 rows left of both
    kinds = []
    for step in range(batches.steps):
        trees = [tree for pack, _ in batches[step].packs for tree in pack.trees]
        kinds.append({bool(tree.images) for tree in trees})
        assert len(trees) == (3 if step < 4 else 1)
    assert sorted(map(len, kinds[:3])) == [1, 1, 1]
    every = [row for group in batches._groups(0) for row in group]
    assert sorted(every) == [(0, index) for index in range(13)]
    assert list(batches._groups(0)) == list(Batches(recipe, batches.processor)._groups(0))


def test_steps_are_prepared_ahead_and_come_in_order() -> None:
    started, release = [], threading.Event()

    def make(step: int) -> int:
        started.append(step)
        if step == 3:
            release.set()
        if step == 0:
            release.wait(30)  # not before another thread came as far as 3
        return step

    assert list(prefetch(make, 0, 6, workers=4)) == [0, 1, 2, 3, 4, 5]
    assert set(started[:4]) == {0, 1, 2, 3}


def test_an_error_waits_for_its_step() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise InputError("row 3 is spoiled")
        return step

    read_batches = []
    with pytest.raises(InputError, match="row 3"):
        for step in prefetch(make, 0, 5, workers=3):
            read_batches.append(step)
    assert read_batches == [0, 1]


def test_pictures_that_cannot_be_read_are_skipped_within_the_budget(
    make_recipe: MakeRecipe, rows: Path, tmp_path: Path
) -> None:
    (tmp_path / "torn.png").write_bytes((rows / "0.png").read_bytes()[:60])
    row = json.loads((rows / "rows.jsonl").read_text().splitlines()[0]) | {"id": "torn", "image": "torn.png"}
    path = tmp_path / "torn.jsonl"
    path.write_text((rows / "rows.jsonl").read_text() + json.dumps(row) + "\n")
    changes = {"data": [{"rows": str(path)}], "pictures": [str(rows), str(tmp_path)], "epochs": 1}
    with pytest.raises(InputError, match=r"1 bad row, max_bad_rows allows 0.*torn\.png"):
        run(make_recipe("strict", **changes))
    folder = run(make_recipe("lenient", max_bad_rows=1, **changes))
    assert open_model(folder).provenance["stages"][-1]["skipped_rows"] == 1


def test_a_run_that_teaches_nothing_is_refused(make_recipe: MakeRecipe, rows: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (rows / "rows.jsonl").read_text().splitlines()]
    for line in lines:
        line["conversations"][0]["value"] = "<image>\n" + "long " * 100  # beyond the context of 256
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match=r"none of 8 rows tried can be learned from; the last: .*context"):
        run(make_recipe(data=[{"rows": str(path)}], max_bad_rows=99))


def test_pictures_too_large_for_the_context_are_refused(make_recipe: MakeRecipe) -> None:
    setup = prepare(load_recipe(make_recipe()))
    config = setup.processor.config
    setup.processor.config = dataclasses.replace(
        config, decoder=dataclasses.replace(config.decoder, context=4)
    )
    with pytest.raises(InputError, match="a picture takes 4 tokens, a row at most 4; raise the context"):
        check_image_tokens(setup)


def test_a_disk_without_room_is_told_before_the_first_step(make_recipe: MakeRecipe) -> None:
    recipe = load_recipe(make_recipe(keep_last=10**9))
    recipe.output.mkdir()
    with pytest.raises(InputError, match=r"needs .* GB \(1000000000 \+ 1 checkpoints .* lower keep_last"):
        check_disk(recipe, sizes(recipe, read_parts(recipe).config, "cpu"))


def test_a_mean_per_pack_is_another_loss(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run(make_recipe("tokens", max_steps=1, batch=4, pack_tokens=64))
    run(make_recipe("packs", max_steps=1, batch=4, pack_tokens=64, loss_average="micro_batch"))
    events = [read_metrics(tmp_path / name / "metrics.jsonl")[0] for name in ("tokens", "packs")]
    assert events[0]["supervised"] == events[1]["supervised"]
    assert events[0]["loss"] != events[1]["loss"]
    assert events[0]["loss"] == pytest.approx(events[1]["loss"], rel=0.2)


def test_a_finished_model_tells_what_it_was_made_of(
    make_recipe: MakeRecipe, rows: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    held_out = [{"rows": str(rows / "rows.jsonl")}]
    stage = {"learn": {"connector": 1e-3, "decoder": 1e-3}}
    changes = {"held_out": held_out, "trackers": ["tensorboard"], "stage": stage, "measure_every": 2}
    folder = run(make_recipe(max_steps=4, sample_answers=1, workers=3, **changes))
    stage_record = open_model(folder).provenance["stages"][-1]
    assert stage_record["versions"]["torch"] and stage_record["digests"]
    assert [answer["step"] for answer in stage_record["answers"]] == [0, 4]
    first = read_metrics(tmp_path / "run" / "metrics.jsonl")[2]
    parts = [first[f"gradient_norm/{part}"] for part in ("connector", "decoder")]
    assert first["gradient_norm"] == pytest.approx((parts[0] ** 2 + parts[1] ** 2) ** 0.5)
    assert first["peak_share"] > 0
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
    assert load_recipe(tmp_path / "run" / "recipe.yaml").max_steps == 4


def test_boxes_are_mirrored_with_their_pictures(make_recipe: MakeRecipe, rows: Path, tmp_path: Path) -> None:
    """And a row whose text itself holds a box is not mirrored: it would no longer be right."""

    def turns(answer: str) -> list[dict[str, str]]:
        return [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": answer}]

    objects = {"ref": [], "bbox": [[0.1, 0.2, 0.3, 0.4]], "bbox_type": "norm1"}
    boxed = {"id": "a", "image": "0.png", "conversations": turns("<bbox>"), "objects": objects}
    told = {"id": "b", "image": "1.png", "conversations": turns("[0.1, 0.2, 0.3, 0.4]")}
    path = tmp_path / "boxes.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (boxed, told)))
    learned = {}
    for chance in (0.0, 1.0):
        data = [{"rows": str(path), "mirror": True}]
        recipe = load_recipe(make_recipe(data=data, boxes="picture", mirror_chance=chance, epochs=1))
        batches = Batches(recipe, prepare(recipe).processor)
        flagged = [pair for pack, flags in batches[0].packs for pair in zip(pack.trees, flags, strict=True)]
        for tree, flag in flagged:
            text = batches.processor.tokenizer.backend.decode([n for n in tree.input_ids.tolist() if n >= 0])
            learned[chance, text.rpartition("[")[2].partition("]")[0]] = flag
    assert learned == {
        (0.0, "0.10, 0.20, 0.30, 0.40"): False, (0.0, "0.1, 0.2, 0.3, 0.4"): False,
        (1.0, "0.70, 0.20, 0.90, 0.40"): True, (1.0, "0.1, 0.2, 0.3, 0.4"): False,
    }  # fmt: skip


def test_a_finished_model_writes_boxes_as_its_recipe_said(make_recipe: MakeRecipe) -> None:
    for form, expected in (("qwen", "qwen"), (None, "padded")):
        recipe = load_recipe(make_recipe(**({"boxes": form} if form else {})))
        setup = prepare(recipe)
        assert setup.processor.config.boxes == setup.model.config.boxes == expected
        assert ("boxes" in recipe.stored()) == (form is not None)  # earlier versions read the others
    with pytest.raises(InputError, match=r"boxes.*'padded', 'picture', 'qwen' or 'pixels'"):
        load_recipe(make_recipe(boxes="yolo"))


def test_a_box_outside_its_picture_is_a_bad_row(make_recipe: MakeRecipe, rows: Path, tmp_path: Path) -> None:
    row = json.loads((rows / "rows.jsonl").read_text().splitlines()[0]) | {"id": "out"}
    row |= {"objects": {"ref": [], "bbox": [[0, 0, 5000, 1]], "bbox_type": "real"}}
    row["conversations"][1]["value"] += " <bbox>"
    path = tmp_path / "out.jsonl"
    path.write_text(json.dumps(row))
    recipe = load_recipe(make_recipe(data=[{"rows": str(path)}], epochs=1))
    with pytest.raises(InputError, match=r"1 bad row, max_bad_rows allows 0.*reaches out of its picture of"):
        Batches(recipe, prepare(recipe).processor)[0]
