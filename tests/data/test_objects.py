"""Rows with names and boxes: read in ms-swift's form and from COCO, checked, converted, and asked about."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from samples import jsonl

from pumice.boxes import FORMS, BoxMap, write_boxes
from pumice.conversation import Objects
from pumice.data.check import check
from pumice.data.convert import convert
from pumice.data.fix import fix
from pumice.data.mapping import RowMapping
from pumice.data.rows import ImageFinder, Rows
from pumice.errors import InputError

SIZE = (200, 100)
ROW: dict[str, Any] = {
    "id": "a",
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "<image>\nFind the <ref-object>."},
        {"from": "gpt", "value": "<bbox>"},
    ],
    "objects": {"ref": ["dog"], "bbox": [[20, 10, 100, 50]], "bbox_type": "real"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", SIZE).save(tmp_path / "a.png")
    return tmp_path


def read(folder: Path, *rows: dict[str, Any]) -> Rows:
    return Rows(jsonl(folder / "rows.jsonl", list(rows)))


def changed(**objects: Any) -> dict[str, Any]:
    return {**ROW, "objects": {**ROW["objects"], **objects}}


def texts(rows: Rows, index: int = 0) -> list[str]:
    """What a model whose boxes are shares of the picture learns of a row."""
    conversation = rows[index].conversation(None)
    maps = [BoxMap(FORMS["picture"], SIZE)] * len(conversation.images)
    return [message.text for message in write_boxes(conversation, maps).messages]


def test_ms_swift_s_rows_are_read(folder: Path) -> None:
    dogs = {"ref": ["a dog", "a cat"], "bbox": [[20, 10, 100, 50], [100, 50, 200, 100]]}
    messages = [
        {"role": "user", "content": "<image>Describe it."},
        {"role": "assistant", "content": "<ref-object><bbox> and <ref-object><bbox> play."},
    ]
    swift = {"messages": messages, "images": ["a.png"], "objects": {**dogs, "bbox_type": None}}
    rows = read(folder, swift, ROW, {**ROW, "objects": json.dumps(ROW["objects"])})
    assert texts(rows) == [
        "Describe it.",
        "a dog[0.10, 0.10, 0.50, 0.50] and a cat[0.50, 0.50, 1.00, 1.00] play.",
    ]
    assert texts(rows, 1) == texts(rows, 2) == ["Find the dog.", "[0.10, 0.10, 0.50, 0.50]"]
    assert rows[1].objects == Objects(("dog",), ((20, 10, 100, 50),), "real", (0,))


def test_objects_of_other_programs_are_left_alone(folder: Path) -> None:
    """`objects` was ignored before it had a meaning; where `<bbox>` asks for it, it is told."""
    words = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog"}]
    for objects in ({"bbox": [[1, 2, 3, 4]], "category": [3]}, [{"name": "dog"}], "dog"):
        rows = read(folder, {**ROW, "conversations": words, "objects": objects}, {**ROW, "objects": objects})
        assert rows[0].objects is None and rows.contents.usable.tolist() == [True, False]
        with pytest.raises(InputError, match="row 'a': 1 <bbox> for 0 boxes"):
            rows[1].conversation(None)


BAD = [
    ({"bbox": [[20, 10, 210, 50]]}, "box outside the picture", "reaches out of its picture of 200 x 100"),
    ({"bbox": [[100, 10, 20, 50]]}, "swapped corners", "[100, 10, 20, 50] ends before it begins"),
    ({"bbox": [[20, 10, 20, 50]]}, "empty box", "[20, 10, 20, 50] has no area"),
    ({"bbox": [[20, 10, float("nan"), 50]]}, "box without numbers", "[20, 10, nan, 50] is not four finite"),
    ({"bbox": [[20, 10]]}, "box without numbers", "the box [20, 10] is not four numbers"),
    ({"bbox": [[20, 10, 10**400, 50]]}, "box without numbers", "has a whole number that is too large"),
    ({"bbox": []}, "box placeholders", "1 <bbox> for 0 boxes"),
    ({"ref": []}, "box placeholders", "1 <ref-object> for 0 refs"),
    ({"bbox_type": "percent"}, "unknown unit of boxes", "bbox_type is 'percent'; use one of real, norm1"),
    ({"image_id": [1]}, "box without a picture", "is of picture 1, the row has 1"),
    ({"image_id": ["0"]}, "malformed row", "'image_id' of 'objects' must be a list of whole numbers"),
    ({"ref": [3]}, "malformed row", "'ref' of 'objects' must be a list of texts"),
    ({"bbox": "here"}, "malformed row", "'bbox' of 'objects' must be a list, found text"),
]  # fmt: skip


def test_the_check_tells_what_is_wrong_with_boxes_by_row(folder: Path) -> None:
    rows = read(folder, ROW, *({**changed(**changes), "id": str(n)} for n, (changes, _, _) in enumerate(BAD)))
    report = check([rows], ImageFinder(folder))
    told = {problem.row: (problem.kind, problem.reason) for problem in report.problems}
    assert set(told) == set(range(2, len(BAD) + 2)) and report.usable == 1
    for number, (_, kind, words) in enumerate(BAD):
        assert told[number + 2][0] == kind
        assert words in told[number + 2][1] and f"'{number}'" in told[number + 2][1]
    # All but the box outside are known before any picture is opened.
    assert rows.bad_rows(ImageFinder(folder)).sum() == len(BAD) - 1


@pytest.mark.parametrize("objects", [ROW["objects"], {"ref": ["dog"], "bbox": [None]}])
def test_objects_beside_a_video_are_refused(folder: Path, objects: dict[str, Any]) -> None:
    """Its frames are taken when the row is learned, so no box says of which it is."""
    Image.new("RGB", SIZE).save(folder / "a.gif")
    turns = [{"from": "human", "value": "<video><image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    row = {**ROW, "video": "a.gif", "conversations": turns}
    rows = read(folder, {**row, "objects": objects}, {**row, "id": "b", "objects": None})
    [problem] = check([rows], ImageFinder(folder)).problems
    assert (problem.row, problem.kind) == (1, "objects beside a video")
    assert "row 'a': 'objects' are those of pictures; remove them or the video" in problem.reason
    assert rows.contents.usable.tolist() == [False, True]


def test_an_assumed_unit_is_told_and_the_row_is_used(folder: Path) -> None:
    rows = [
        {**changed(bbox_type=None), "id": "pixels"},
        {**changed(bbox_type=None, bbox=[[0.1, 0.1, 0.5, 0.5]]), "id": "shares"},
        {**changed(bbox_type=None, bbox=[[0.1, 0.1, 1.0004, 0.5]]), "id": "rounded"},
        {**changed(bbox=[[20, 10, 100, 50], [1, 1, 9, 9]]), "id": "more"},
    ]
    opened = read(folder, *rows)
    report = check([opened], ImageFinder(folder))
    assert report.ok and report.usable == 4
    assert [(problem.id, problem.kind, problem.reason) for problem in report.problems] == [
        ("pixels", "unit of boxes assumed", "no bbox_type: its boxes are read as real"),
        ("shares", "unit of boxes assumed", "no bbox_type: its boxes are read as norm1"),
        ("rounded", "unit of boxes assumed", "no bbox_type: its boxes are read as norm1"),
        ("more", "boxes not used", "1 of 2 boxes has no <bbox> in its texts"),
    ]
    assert texts(opened) == texts(opened, 1)
    assert texts(opened, 2)[1] == "[0.10, 0.10, 1.00, 0.50]"


def instances(folder: Path, **first: Any) -> Path:
    images = [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "b.png"}]
    notes: list[dict[str, Any]] = [
        {"id": 1, "image_id": 7, "category_id": 3, "bbox": [20, 10, 80, 40], **first},
        {"id": 2, "image_id": 7, "category_id": 1, "bbox": [0, 0, 10, 10]},
        {"id": 3, "image_id": 7, "category_id": 1, "bbox": [10, 0, 10, 10]},
        {"id": 4, "image_id": 7, "category_id": 5, "bbox": [0, 0, 200, 100], "iscrowd": 1},
        {"id": 6, "image_id": 8, "category_id": 5, "bbox": [0, 0, 200, 100], "iscrowd": 1},
        {"id": 5, "image_id": 7, "category_id": 6},
    ]
    categories = {3: "dog", 1: "cat", 5: "person", 6: "sky"}
    names = [{"id": number, "name": name} for number, name in categories.items()]
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": notes, "categories": names}))
    return path


LISTED = "dog [0.10, 0.10, 0.50, 0.50]\ncat [0.00, 0.00, 0.05, 0.10]\ncat [0.05, 0.00, 0.10, 0.10]\nsky"


def test_coco_s_instances_become_questions(folder: Path) -> None:
    """All things in a list, then those that occur once, in LLaVA-1.5's words. Crowds are left out."""
    assert len(Rows(instances(folder))) == 1  # the other picture shows nothing but a crowd
    where = "Please provide the bounding box coordinate of the region this sentence describes: dog"
    assert texts(Rows(instances(folder))) == [
        "List the objects in this picture, each with its box.", LISTED,
        where, "[0.10, 0.10, 0.50, 0.50]",
    ]  # fmt: skip
    own = Rows(instances(folder), mapping=RowMapping(question="What is there?"))
    assert texts(own) == ["What is there?", LISTED]


def test_coco_s_damaged_boxes_are_told(folder: Path) -> None:
    for first, kind in (
        ({"bbox": [20, 10, 0, 40]}, "empty box"),
        ({"bbox": [20, 10, 300, 40]}, "box outside the picture"),
        ({"bbox": [20, 10, -5, 40]}, "swapped corners"),
        ({"bbox": [20, 10, 5]}, "box without numbers"),
        ({"bbox": "x"}, "box without numbers"),
    ):
        report = check([Rows(instances(folder, **first))], ImageFinder(folder))
        assert [problem.kind for problem in report.problems] == [kind]
        assert report.problems[0].row == 1 and report.usable == 0


@pytest.mark.parametrize("form", ["llava", "parquet", "webdataset"])
def test_conversion_keeps_boxes(form: str, folder: Path) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow")
    rows = read(folder, ROW, {**ROW, "id": "b", "objects": None, "conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog"}]})  # fmt: skip
    for source, name in ((rows, "rows"), (Rows(instances(folder)), "coco")):
        out = folder / name
        convert(source, out, form, ImageFinder(folder))
        again = Rows(out / "rows.jsonl" if form == "llava" else out)
        assert [row.objects for row in again] == [row.objects for row in source]
        assert [row.turns for row in again] == [row.turns for row in source]


def test_a_cleaned_copy_keeps_boxes(folder: Path) -> None:
    # The third has the id and the words of the first, and another box.
    rows = read(folder, ROW, {**changed(bbox=[[3, 2, 1, 4]]), "id": "b"}, changed(bbox=[[0, 0, 9, 9]]), ROW)
    counts = fix(rows, ImageFinder(folder), check([rows], ImageFinder(folder)), folder / "clean.jsonl")
    assert counts["rows left out"] == counts["ids made different"] == counts["repeated rows left out"] == 1
    clean = Rows(folder / "clean.jsonl")
    assert [(row.id, row.objects) for row in clean] == [("a", rows[0].objects), ("a-2", rows[2].objects)]


def test_a_changed_box_is_another_digest(folder: Path) -> None:
    digests = {
        Rows(jsonl(folder / f"{n}.jsonl", [row])).contents.digest
        for n, row in enumerate((ROW, changed(bbox=[[20, 10, 100, 51]]), changed(ref=["cat"])))
    }
    assert len(digests) == 3


def test_boxes_without_names_need_words(folder: Path) -> None:
    row = {"id": "a", "image": "a.png", "objects": {"ref": ["dog"], "bbox": [[1, 2, 3, 4], [1, 2, 3, 4]]}}
    with pytest.raises(InputError, match=re.escape("'objects' has 1 name in 'ref' and 2 boxes in 'bbox'")):
        read(folder, row)[0]


def test_boxes_without_words_are_of_the_first_picture_where_no_number_says_otherwise(folder: Path) -> None:
    Image.new("RGB", SIZE).save(folder / "b.png")
    corners = [[20, 10, 100, 50], [0, 0, 200, 100]]
    objects = {"ref": ["dog", "cat"], "bbox": corners, "bbox_type": "real"}
    rows = read(folder, *(
        {"id": str(n), "image": ["a.png", "b.png"], "objects": {**objects, "image_id": numbers}}
        for n, numbers in enumerate(([1], [1, 0, 1], []))
    ))  # fmt: skip
    # The list of both, then the question about each.
    assert [row.objects.images for row in rows if row.objects] == [(1, 0, 1, 0), (1, 0, 1, 0), (0, 0, 0, 0)]
