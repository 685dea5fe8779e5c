"""Annotation files as contexts, and one sentence for each thing that can be wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pumice.data.rows import ImageFinder
from pumice.errors import InputError
from pumice.synth.context import AnnotatedBox, BadRows, Context
from pumice.synth.sources import coco, flickr30k, gather, plain, visual_genome

IMAGES = [{"id": 7, "file_name": "000000000007.jpg", "width": 200, "height": 100}]
CATEGORIES = [{"id": 18, "name": "dog"}]


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, content: Any) -> Path:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def captions(*texts: str, **more: Any) -> dict[str, Any]:
    notes = [{"id": n, "image_id": 7, "caption": text} for n, text in enumerate(texts)]
    return {"info": {}, "images": IMAGES, "annotations": notes, **more}


def instances(box: Any = (20, 10, 60.5, 50), category: int = 18, **more: Any) -> dict[str, Any]:
    notes = [{"id": 5, "image_id": 7, "category_id": category, "bbox": box, "segmentation": [[1.5, 2.5]]}]
    return {"images": IMAGES, "categories": CATEGORIES, "annotations": notes, **more}


def test_coco(written: Callable[..., Path]) -> None:
    files = written("captions.json", captions("A dog\n runs. ", "The dog.")), written("i.json", instances())
    [context] = coco(*files, BadRows())
    assert context == Context(
        "coco/000000000007",
        "000000000007.jpg",
        ("A dog runs.", "The dog."),
        (AnnotatedBox("dog", (0.1, 0.1, 0.4025, 0.6)),),
    )
    assert context.described(boxes=True) == "A dog runs.\nThe dog.\n\ndog: [0.100, 0.100, 0.403, 0.600]"
    assert context.described(boxes=False) == "A dog runs.\nThe dog."


def test_a_byte_order_mark_is_no_matter(written: Callable[..., Path]) -> None:
    file = written("captions.json", b"\xef\xbb\xbf" + json.dumps(captions("A dog.")).encode())
    assert [c.captions for c in coco(file, None, BadRows())] == [("A dog.",)]


def test_visual_genome(written: Callable[..., Path], tmp_path: Path) -> None:
    sizes = [{"image_id": 3, "url": "https://example.org/x/VG_100K_2/3.jpg", "width": 100, "height": 50}]
    written("image_data.json", sizes)
    regions = [{"region_id": 1, "phrase": "grey cat", "x": 0, "y": 0, "width": 9, "height": 9}]
    written("region_descriptions.json", [{"id": 3, "regions": regions}])
    written(
        "objects.json", [{"image_id": 3, "objects": [{"names": ["cat"], "x": 10, "y": 5, "w": 20, "h": 10}]}]
    )
    [context] = visual_genome(tmp_path, BadRows())
    box = AnnotatedBox("cat", (0.1, 0.1, 0.3, 0.3))
    assert context == Context("vg/3", "VG_100K_2/3.jpg", ("grey cat",), (box,))


@pytest.mark.parametrize(
    "text",
    [
        "12.jpg#0\tA man sits .\n12.jpg#1\tSomeone waits .\n",
        "image_name| comment_number| comment\n12.jpg| 0| A man sits .\n12.jpg| 1| Someone waits .\n",
        json.dumps(
            {
                "images": [
                    {"filename": "12.jpg", "sentences": [{"raw": "A man sits ."}, {"raw": "Someone waits ."}]}
                ]
            }
        ),
    ],
)
def test_flickr30k(written: Callable[..., Path], text: str) -> None:
    [context] = flickr30k(written("f", text), BadRows())
    assert context == Context("flickr30k/12", "12.jpg", ("A man sits .", "Someone waits ."))


def test_plain(written: Callable[..., Path]) -> None:
    line = {
        "image": "a/b.jpg",
        "boxes": [{"category": "cup", "box": [0, 5, 10, 10]}],
        "width": 20,
        "height": 10,
    }
    more = {"id": "x", "image": "c.jpg", "captions": ["Tea."], "text": "Taken in 1990."}
    examples = list(plain(written("l.jsonl", f"{json.dumps(line)}\n\n{json.dumps(more)}\n"), BadRows()))
    assert examples[0] == Context("a/b", "a/b.jpg", (), (AnnotatedBox("cup", (0, 0.5, 0.5, 1)),))
    assert examples[1] == Context("x", "c.jpg", ("Tea.",), (), "Taken in 1990.")


BAD: list[tuple[str, Any, Any, str]] = [
    ("empty caption", captions("A dog.", "  "), None, "annotation 1: the caption is empty; remove it"),
    (
        "no such picture",
        captions(annotations=[{"id": 1, "image_id": 8, "caption": "x"}]),
        None,
        "picture 8 is not in",
    ),
    ("nothing about a picture", captions(), None, "picture '000000000007.jpg' (id 7) has no annotation"),
    ("no pictures", {"annotations": []}, None, "lists no pictures under 'images'"),
    ("box outside", None, instances([150, 10, 100, 50]), "reaches out of the picture of 200 x 100; mend it"),
    ("box without area", None, instances([20, 10, 0, 50]), "has no area; mend it"),
    ("no box", None, instances("here"), "'bbox' is 'here'; write left, top, width, height"),
    ("unknown category", None, instances(category=3), "category 3 is not among the 1 listed; mend it"),
    ("no categories", None, instances(categories=[]), "lists no 'categories'"),
    (
        "other encoding",
        json.dumps(captions("A dog.")).encode("utf-16"),
        None,
        "is UTF-16, not UTF-8 text; save it",
    ),
    ("latin-1", b'{"images": [{"id": 7, "file_name": "caf\xe9.jpg"}]}', None, "is not UTF-8 text"),
    (
        "cut off",
        json.dumps(captions("A dog.")).encode()[:-20],
        None,
        "is malformed or cut off at line 1, column",
    ),
    (
        "no comma",
        b'{"images": [{"id": 7, "file_name": "a.jpg"}] "annotations": []}',
        None,
        "the JSON object is malformed or cut off at line 1, column 46 (a comma is missing)",
    ),
    (
        "no colon",
        b'{"images" [{"id": 7, "file_name": "a.jpg"}]}',
        None,
        "at line 1, column 11 (a colon behind a key is missing); fix the file",
    ),
    (
        "no end",
        b'{"images": [{"id": 7, "file_name": "a.jpg"}]',
        None,
        "at line 1, column 45 (it ends too early); fix the file",
    ),
    (
        "a comma too many",
        b'{"images": [{"id": 7, "file_name": "a.jpg"}],}',
        None,
        "at line 1, column 46 (a key in double quotes is missing); fix the file",
    ),
    (
        "two objects",
        json.dumps(captions("A dog.")) + json.dumps(captions("A cat.")),
        None,
        "more follows the end of the JSON, at line 1, column",
    ),
    (
        "no object",
        "x" + json.dumps(captions("A dog.")),
        None,
        "malformed or cut off at line 1, column 1 (the object is missing)",
    ),
    ("packed", b"\x1f\x8b\x08\x00", None, "is gzip, not UTF-8 text; unpack it"),
    ("empty", b"", None, "is empty; fetch it again"),
    ("wrong file", instances(), None, "has no 'caption'; give the captions file of COCO, not another"),
]


@pytest.mark.parametrize(("_", "captions_json", "boxes_json", "message"), BAD, ids=[case[0] for case in BAD])
def test_bad_coco(
    written: Callable[..., Path], _: str, captions_json: Any, boxes_json: Any, message: str
) -> None:
    files = (
        None if captions_json is None else written("captions.json", captions_json),
        None if boxes_json is None else written("instances.json", boxes_json),
    )
    with pytest.raises(InputError, match=r"^[^\n]+$") as error:
        list(coco(*files, BadRows()))
    assert message in str(error.value)
    assert ".json" in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: this is not JSON"),
        ("[1]", "expected an object, found [1]"),
        ('{"captions": ["x"]}', "'image' is None; write the path of a picture"),
        ('{"image": "a.jpg"}', "picture 'a.jpg' has neither captions nor boxes nor text"),
        ('{"image": "a.jpg", "captions": "x"}', "'captions' must be a list of texts"),
        ('{"image": "a.jpg", "boxes": [{"box": [0, 0, 1, 1]}]}', "has no category; write one"),
        (
            '{"image": "a.jpg", "boxes": [{"category": "x", "box": [0, 0, 9, 9]}]}',
            "a box in pixels needs 'width' and 'height'",
        ),
        ('{"image": "a.jpg", "boxes": [{"category": "x", "bbox": [0, 0, 1, 1]}]}', "the box of 'x' is None"),
    ],
)
def test_bad_lines(written: Callable[..., Path], line: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        list(plain(written("l.jsonl", line), BadRows()))
    assert message in str(error.value)


def test_some_may_be_spoiled(written: Callable[..., Path]) -> None:
    file = written("captions.json", captions("A dog.", "", " "))
    bad_rows = BadRows(allowed=2)
    assert [c.captions for c in coco(file, None, bad_rows)] == [("A dog.",)]
    assert bad_rows.count == 2
    with pytest.raises(
        InputError, match=r"annotation 2: .* with --set max_spoiled=N \(1 before it were allowed\)"
    ):
        list(coco(file, None, BadRows(allowed=1)))


def test_pictures_are_looked_up(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    contexts = [Context("a", "a.jpg", ("x",)), Context("b", "b.jpg", ("x",))]
    finder = ImageFinder(tmp_path)
    assert gather([iter(contexts)], finder, BadRows(1), None) == contexts[:1]
    with pytest.raises(InputError, match=r"picture 'b\.jpg' is not in .*; fetch it or name its folder"):
        gather([iter(contexts)], finder, BadRows(), None)
    with pytest.raises(InputError, match="two pictures have the id 'a'"):
        gather([iter(contexts), iter(contexts)], None, BadRows(), None)
    with pytest.raises(InputError, match="no picture with annotations is left"):
        gather([iter(())], None, BadRows(), None)
    assert len(gather([iter(contexts)], None, BadRows(), 1)) == 1


def test_fields_that_differ_from_the_official_ones(written: Callable[..., Path]) -> None:
    file = written("dataset_flickr30k.json", {"images": [{"filename": "a.jpg", "sentences": 7}]})
    with pytest.raises(InputError, match="of 0 pictures: its fields are not the official ones"):
        gather([flickr30k(file, BadRows())], None, BadRows(), None)
