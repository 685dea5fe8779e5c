"""RefCOCO in its official layout, and questions of one's own whose answers are boxes."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pumice.config import DecoderConfig, ImagePolicy, ModelConfig, VisionConfig
from pumice.errors import InputError
from pumice.evaluate.tasks import get_task
from pumice.evaluate.tasks.refcoco import RefCoco

# Two photographs, a tall and a wide one; boxes as COCO has them: left, top, width, height.
IMAGES = [
    {"id": 1, "file_name": "COCO_train2014_000000000001.jpg", "width": 300, "height": 500},
    {"id": 2, "file_name": "COCO_train2014_000000000002.jpg", "width": 640, "height": 480},
]
BOXES = {
    10: (1, [30.5, 40.0, 100.0, 200.25]),
    11: (1, [0.0, 300.0, 299.5, 199.0]),
    12: (2, [320.0, 96.0, 200.0, 240.0]),
}
SPLITS = {"refcoco": ("unc", "testA"), "refcoco+": ("unc", "testB"), "refcocog": ("umd", "test")}


def refs(split: str) -> list[dict[str, Any]]:
    """As in refs(unc).p: several sentences about a thing, in one split."""
    found = []
    for number, (annotation, (image, _)) in enumerate(BOXES.items()):
        sentences = [
            {
                "sent_id": 10 * number + n,
                "sent": f"thing {number}, words {n}",
                "raw": "?",
                "tokens": ["thing"],
            }
            for n in range(2)
        ]
        ref = {"ref_id": number, "ann_id": annotation, "image_id": image, "category_id": 1, "file_name": "x",
               "split": split if number else "val", "sentences": sentences, "sent_ids": [0, 1]}  # fmt: skip
        found.append(ref)
    return found


def write(data: Any, name: str, maker: str, values: Any) -> None:
    notes = [{"id": key, "image_id": image, "bbox": box} for key, (image, box) in BOXES.items()]
    data.json(f"{name}/instances.json", {"images": IMAGES, "annotations": notes, "categories": []})
    (data.path / name / f"refs({maker}).p").write_bytes(pickle.dumps(values, protocol=2))


def iou_by_hand(text: str, size: tuple[int, int], box: list[float]) -> float:
    """A script from the definition: undo LLaVA's padding, then areas of two boxes in pixels."""
    numbers = re.findall(r"\d*\.\d+|\d+", text)
    if len(numbers) != 4:
        return 0.0
    side = max(size)
    x1, y1, x2, y2 = (float(n) * side for n in numbers)
    x1, x2 = x1 - (side - size[0]) // 2, x2 - (side - size[0]) // 2
    y1, y2 = y1 - (side - size[1]) // 2, y2 - (side - size[1]) // 2
    left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    both = max(0, min(x2, right) - max(x1, left)) * max(0, min(y2, bottom) - max(y1, top))
    return both / ((x2 - x1) * (y2 - y1) + box[2] * box[3] - both)


@pytest.mark.parametrize("name", SPLITS)
def test_refcoco_is_scored_as_a_script_from_its_definition(
    name: str, data: Any, scored: Callable[..., Any], asked: Callable[..., Any]
) -> None:
    maker, split = SPLITS[name]
    write(data, name, maker, refs(split))
    draw = random.Random(3)
    for _ in range(5):
        answers: dict[str, str] = {}
        expected = []
        for number, (image, box) in enumerate(BOXES.values()):
            width, height = next((i["width"], i["height"]) for i in IMAGES if i["id"] == image)
            for n in range(2 if number else 0):  # the first thing is in another split
                side = max(width, height)
                pads = [(side - width) // 2, (side - height) // 2] * 2
                corners = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
                near = [
                    (c + pad) / side + draw.uniform(-0.15, 0.15) for c, pad in zip(corners, pads, strict=True)
                ]
                near = [min(max(v, 0.0), 1.0) for v in near]
                text = f"[{', '.join(f'{v:.2f}' for v in near)}]" if draw.random() < 0.8 else "I do not know."
                answers[str(10 * number + n)] = text
                usable = near[0] <= near[2] and near[1] <= near[3]
                expected.append(iou_by_hand(text, (width, height), box) if usable else 0.0)
        result = scored(name, answers, split)
        assert result["metrics"]["mean_iou"] == pytest.approx(100 * sum(expected) / 4)
        assert result["metrics"]["accuracy"] == pytest.approx(100 * sum(v >= 0.5 for v in expected) / 4)
    questions = asked(name, split)
    assert questions["10"].prompt == (
        "Please provide the bounding box coordinate of the region this sentence describes: thing 1, words 0"
    )
    assert list(questions) == ["10", "11", "20", "21"]
    assert set(asked(name, "val")) == {"0", "1"}
    assert asked(name, "train") == {}


def test_every_split_is_read_from_the_file_of_its_maker(data: Any, asked: Callable[..., Any]) -> None:
    write(data, "refcocog", "google", refs("train"))
    assert set(asked("refcocog", "google-train")) == {"10", "11", "20", "21"}
    with pytest.raises(InputError, match=re.escape("'refcocog/refs(umd).p' or 'refs(umd).p' is not in")):
        asked("refcocog", "val")
    with pytest.raises(
        InputError, match="refcocog has no split 'testA'; use one of val, test, train, google-val"
    ):
        asked("refcocog", "testA")


def test_an_overlap_of_exactly_half_is_right(data: Any, scored: Callable[..., Any]) -> None:
    write(data, "refcoco", "unc", refs("val")[2:])
    # The truth is 200 x 240 at (320, 96) of 640 x 480. These are half of its width and all of its height.
    task = get_task("refcoco")
    task.box_form = "qwen"
    for right, correct in ((656.25, 1), (656.0, 0)):
        text = f"(500,200),({right},700)"
        result = scored("refcoco", {"20": text, "21": "no"}, "val", task=task)
        assert result["metrics"]["accuracy"] == 50.0 * correct
        assert result["metrics"]["unread"] == 1
        assert "boxes are read in the form 'qwen'; --boxes names another" in result["notes"]


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("echo broken",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            pickle.dumps([Evil()]),
            r"refs\(unc\)\.p': the pickle names the code posix\.system; only plain data",
        ),
        (pickle.dumps([Path("a")]), r"the pickle names the code pathlib\S*; only plain data"),
        (pickle.dumps(refs("val"))[:-40], r"refs\(unc\)\.p' is no whole pickle \("),
        (b"", r"is no whole pickle \("),
        (pickle.dumps({"a": 1}), "holds no list of refs"),
        (pickle.dumps([{"ref_id": 3}]), r"ref 1: 'ann_id', 'image_id', 'split', 'sentences' is missing"),
        (
            pickle.dumps([{**refs("val")[0], "ann_id": 99}]),
            r"refs\(unc\)\.p': ref 0 names picture 1 and annotation 99, which '[^']*' does not have; give",
        ),
    ],
)
def test_a_pickle_that_is_not_the_official_one(
    content: bytes, words: str, data: Any, asked: Callable[..., Any]
) -> None:
    write(data, "refcoco", "unc", [])
    (data.path / "refcoco" / "refs(unc).p").write_bytes(content)
    with pytest.raises(InputError, match=words):
        asked("refcoco", "val")


@pytest.mark.parametrize(
    ("note", "image", "sentence", "words"),
    [
        (
            {"bbox": [1, 2, 3]},
            {},
            {},
            "ref 1, its sentences, picture and box: its fields are not the official ones (ValueError",
        ),
        (
            {"bbox": [1, 2, "3", 4]},
            {},
            {},
            "ref 1, its sentences, picture and box: its fields are not the official ones (Type",
        ),
        ({"bbox": [1, 2, float("nan"), 4]}, {}, {}, "the box [1, 2, nan, 4] is not four finite numbers"),
        (
            {},
            {"height": None},
            {},
            "ref 1, its sentences, picture and box: its fields are not the official ones (TypeError",
        ),
        (
            {},
            {"width": "wide"},
            {},
            "ref 1, its sentences, picture and box: its fields are not the official ones (ValueError",
        ),
        (
            {},
            {},
            {"sent": 3},
            "ref 1, its sentences, picture and box: its fields are not the official ones (TypeError",
        ),
        (
            {"id": [1]},
            {},
            {},
            "instances.json', images with id, annotations with id and bbox: its fields are not",
        ),
    ],
)
def test_refs_whose_values_are_not_of_their_form(
    note: dict[str, Any],
    image: dict[str, Any],
    sentence: dict[str, Any],
    words: str,
    data: Any,
    asked: Callable[..., Any],
) -> None:
    def write_files(note: dict[str, Any], image: dict[str, Any], sentence: dict[str, Any]) -> None:
        ref = {**refs("val")[0], "sentences": [{"sent_id": 0, "sent": "a dog", **sentence}]}
        (data.path / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps([ref]))
        notes = [{"id": 10, "image_id": 1, "bbox": [1, 2, 3, 4], **note}]
        data.json("refcoco/instances.json", {"images": [{**IMAGES[0], **image}], "annotations": notes})

    write(data, "refcoco", "unc", [])
    write_files({}, {}, {})
    assert set(asked("refcoco", "val")) == {"0"}
    write_files(note, image, sentence)
    with pytest.raises(InputError, match=re.escape(words)):
        asked("refcoco", "val")


def test_refs_without_their_instances(data: Any, asked: Callable[..., Any]) -> None:
    write(data, "refcoco", "unc", refs("val"))
    (data.path / "refcoco" / "instances.json").unlink()
    with pytest.raises(InputError, match=r"instances\.json' is missing; put the instances\.json of"):
        asked("refcoco", "val")
    assert RefCoco("testB").split == "testB"


# --- the metric `box` of one's own questions ---


def test_the_best_of_several_right_boxes_counts(data: Any, scored: Callable[..., Any]) -> None:
    Image.new("RGB", (200, 100)).save(data.path / "a.png")
    row = {"image": "a.png", "question": "Where is a dog?", "metric": "box"}
    data.lines(
        "questions.jsonl",
        [
            {**row, "id": "pixels", "answers": [[0, 0, 20, 20], [100, 50, 200, 100]]},
            {**row, "id": "one", "answers": [100, 50, 200, 100], "bbox_type": "real"},
            {**row, "id": "shares", "answers": [[0.5, 0.5, 1, 1]], "bbox_type": "norm1"},
            {**row, "id": "thousandths", "answers": [[500, 500, 1000, 1000]], "bbox_type": "norm1000"},
        ],
    )
    # The square of 200 has 50 pixels of padding above: y 50..100 is 0.5..0.75.
    ids = ("pixels", "one", "shares", "thousandths")
    assert scored("own", dict.fromkeys(ids, "at [0.5, 0.5, 1, 0.75]"))["metrics"]["score"] == 100
    result = scored("own", dict.fromkeys(ids, "[0.5, 0.5, 0.7, 0.75]"))
    assert result["metrics"]["score"] == 0
    assert result["categories"]["metric"]["box"] == {"value": 0.0, "questions": 4}
    result = scored("own", dict.fromkeys(ids, "[0.0, 0.0, 0.1, 0.1] or [0.5, 0.5, 1, 0.75]"))
    assert result["metrics"]["score"] == 0  # the first box is the answer
    result = scored("own", dict.fromkeys(ids, "On the right."))
    assert result["metrics"]["unread"] == 4
    assert "4 answers hold no box, which counts as wrong" in result["notes"]


@pytest.mark.parametrize("unit", ["real", "norm1000"])
def test_one_right_box_in_a_file_has_its_unit(data: Any, unit: str) -> None:
    Image.new("RGB", (200, 100)).save(data.path / "a.png")
    row = {"image": "a.png", "question": "Where?", "metric": "box", "answers": [20, 50, 180, 90]}
    data.lines("own.jsonl", [{**row, "bbox_type": unit}])
    [question] = get_task("own").questions(data.path / "own.jsonl")
    [box] = question.meta["boxes"]
    assert box.corners == ((20, 50, 180, 90) if unit == "real" else (4, 5, 36, 9))


def test_rows_to_learn_are_questions_about_boxes(data: Any, scored: Callable[..., Any]) -> None:
    Image.new("RGB", (200, 100)).save(data.path / "a.png")
    objects = {"ref": ["the dog"], "bbox": [[0, 0, 100, 50], [100, 50, 200, 100], [0, 50, 100, 100]]}
    turns = [
        {"from": "human", "value": "<image>\nBeside <bbox>, where is <ref-object>?"},
        {"from": "gpt", "value": "<bbox> or <bbox>"},
    ]
    row = {"id": "a", "image": "a.png", "objects": {**objects, "bbox_type": "real"}, "conversations": turns}
    told = [{"from": "human", "value": "<image>\nWhat is in <bbox>?"}, {"from": "gpt", "value": "A dog"}]
    data.lines("rows.jsonl", [row, {**row, "id": "b", "conversations": told}])
    task = get_task("own")
    task.box_form = "qwen"
    questions = {q.id: q for q in task.questions(data.path / "rows.jsonl")}
    assert questions["a"].prompt == "Beside (0,0),(500,500), where is the dog?"
    assert questions["b"].prompt == "What is in (0,0),(500,500)?"
    assert (questions["b"].meta["metric"], questions["b"].meta["answers"]) == ("exact", ["A dog"])
    assert [box.corners for box in questions["a"].meta["boxes"]] == [(100, 50, 200, 100), (0, 50, 100, 100)]


def test_boxes_in_a_question_about_two_pictures_are_written_as_the_model_sees_two(data: Any) -> None:
    """In pixels of the square of 56 as which two pictures are shown; one alone is cut into tiles of it."""
    Image.new("RGB", (112, 56)).save(data.path / "a.png")
    objects = {"ref": [], "bbox": [[28, 28, 56, 56]], "bbox_type": "real", "image_id": [1]}
    turns = [
        {"from": "human", "value": "<image>\n<image>\nWhat is in <bbox>?"},
        {"from": "gpt", "value": "It"},
    ]
    data.lines("rows.jsonl", [{"image": ["a.png"] * 2, "objects": objects, "conversations": turns}])
    task = get_task("own")
    decoder = DecoderConfig(vocab_size=8, width=8, depth=1, heads=1, kv_heads=1, head_dim=8, mlp_width=8)
    vision = VisionConfig("clip", 56, 32, 14, depth=2, heads=2, mlp_width=64)
    policy = ImagePolicy("anyres", pinpoints=((112, 56),), several="square")
    task.box_form, task.box_model = "pixels", ModelConfig(decoder, vision, image=policy)
    [question] = task.questions(data.path / "rows.jsonl")
    assert question.prompt == "What is in [14, 28, 28, 42]?"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"answers": [[1, 2, 3]]}, "the box [1, 2, 3] is not four numbers"),
        ({"answers": ["here"]}, "the box ['here'] is not four numbers"),
        ({"answers": [[30, 2, 3, 4]]}, "the box [30, 2, 3, 4] ends before it begins"),
        ({"answers": [[1, 2, 1, 4]]}, "has no area"),
        ({"answers": [[1, 2, 900, 40]]}, "reaches out of its picture of 200 x 100"),
        (
            {"answers": [[1, 2, 3, 4]], "bbox_type": "percent"},
            "bbox_type is 'percent'; use one of real, norm1",
        ),
        ({"answers": [[1, 2, 3, 4]], "image": ["a.png", "a.png"]}, "'box' needs one picture, found 2"),
    ],
)
def test_right_boxes_that_cannot_be_one(changes: dict[str, Any], words: str, data: Any) -> None:
    Image.new("RGB", (200, 100)).save(data.path / "a.png")
    row = {"id": "a", "image": "a.png", "question": "Where?", "metric": "box", **changes}
    (data.path / "own.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=re.escape(words)) as refusal:
        list(get_task("own").questions(data.path / "own.jsonl"))
    assert "own.jsonl', row 1: " in str(refusal.value)
