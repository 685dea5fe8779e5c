"""Boxes as a model reads and writes them, through every way to show a picture, and back."""

from __future__ import annotations

import pickle
import random
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pumice.boxes import (
    COLOURS,
    FORMS,
    Box,
    BoxError,
    BoxMap,
    box_map,
    check_objects,
    draw,
    holds_boxes,
    picture_boxes,
    write_boxes,
)
from pumice.config import ConnectorConfig, DecoderConfig, ImagePolicy, ModelConfig, VisionConfig
from pumice.conversation import Conversation, ImagePart, Message, Objects
from pumice.errors import InputError
from pumice.images import to_tiles
from pumice.media import BOX_FORMS

SIDE = 64  # pixels of a tile
VISION = VisionConfig(
    kind="siglip",
    image_size=SIDE,
    width=32,
    stride=8,
    depth=1,
    heads=2,
    mlp_width=64,
    layer=-1,
    select="full",
)
PINPOINTS = ((64, 128), (128, 64), (128, 128), (192, 64), (64, 192))
POLICIES: dict[str, tuple[ImagePolicy, int]] = {  # and the number of the conversation's pictures
    "pad": (ImagePolicy(), 1),
    "crop": (ImagePolicy(mode="crop"), 1),
    "squash": (ImagePolicy(mode="squash"), 1),
    "anyres": (ImagePolicy(mode="anyres", pinpoints=PINPOINTS), 1),
    "anyres, several": (ImagePolicy(mode="anyres", pinpoints=PINPOINTS, several="square"), 2),
    "split": (ImagePolicy(mode="split", longest_edge=256), 1),
    "grid": (ImagePolicy(mode="grid", longest_edge=256), 1),
}
SIZES = ((640, 480), (333, 500), (97, 31), (64, 64), (41, 1000), (5000, 40))


def config(policy: ImagePolicy, boxes: str = "padded") -> ModelConfig:
    return ModelConfig(DecoderConfig(52, 64, 1, 4, 2, 16, 96), VISION, ConnectorConfig(), policy, boxes=boxes)


def random_box(size: tuple[int, int], draw: random.Random) -> Box:
    x, y = (sorted(draw.uniform(0, side) for _ in range(2)) for side in size)
    return Box(x[0], y[0], x[1], y[1])


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("form", BOX_FORMS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_box_that_is_written_and_read_is_off_by_half_a_unit_at_most(
    policy: str, form: str, mirror: bool
) -> None:
    draw = random.Random(7)
    image_policy, images = POLICIES[policy]
    written = 0
    while written < 1000:
        size = draw.choice(SIZES)
        boxes = box_map(config(image_policy, form), size, images, mirror=mirror)
        box = random_box(size, draw).meet(boxes.shown())
        if box.area <= 0:  # under crop: beside what is shown
            continue
        written += 1
        text = boxes.write(box)
        [found] = boxes.find(f"It is at {text}.")
        assert text == f"It is at {text}."[found.start : found.end]
        half = 0.5 * 10.0 ** -FORMS[form].digits * (1 + 1e-9)
        # One unit is this many pixels of the picture: the map is affine.
        unit = np.subtract(boxes.box((1, 1, 1, 1)).corners, boxes.box((0, 0, 0, 0)).corners)
        assert (np.abs(np.subtract(found.box.corners, box.corners)) <= half * np.abs(unit) + 1e-9).all()
        np.testing.assert_allclose(boxes.box(boxes.numbers(box)).corners, box.corners, atol=1e-7)


def lit(box: Box, size: tuple[int, int]) -> Image.Image:
    """A black picture in which the box is white."""
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), tuple(map(round, box.corners)))
    return image


def bounds(canvas: np.ndarray) -> list[float]:
    """The corners of what is bright on a canvas (H, W)."""
    y, x = np.nonzero(canvas > 0.5)
    return [x.min(), y.min(), x.max() + 1, y.max() + 1]


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_pixels_are_where_the_tower_sees_the_box(policy: str, mirror: bool) -> None:
    """The pictures that `images` makes are looked at: the numbers do not come from the same formula."""
    image_policy, images = POLICIES[policy]
    image_policy = replace(
        image_policy, mean=(0, 0, 0), std=(1, 1, 1), resample="bilinear", pad_color=(0, 0, 0)
    )
    for size, box in (((600, 401), Box(180, 60, 330, 240)), ((201, 320), Box(30, 110, 110, 200))):
        boxes = box_map(config(image_policy, "pixels"), size, images, mirror=mirror)
        tiled = image_policy.uses_tiles(images)
        tiles = to_tiles(lit(box, size), SIDE, image_policy, tiles=tiled, mirror=mirror)[:, 0]
        if tiled:
            assert boxes.placed is not None
            columns, rows = (n // SIDE for n in boxes.placed.canvas)
            parts = tiles[:-1] if image_policy.mode == "split" else tiles[1:]
            assert len(parts) == columns * rows > 1
            canvas = np.vstack([np.hstack(list(row)) for row in parts.reshape(rows, columns, SIDE, SIDE)])
        else:
            canvas = tiles[0]
        # Where brightness is halved, resampled edges lie within a pixel.
        assert np.abs(np.subtract(bounds(canvas), boxes.numbers(box.meet(boxes.shown())))).max() <= 1.0


def test_llava_and_qwen_write_boxes_as_published() -> None:
    box = Box(64, 96, 320, 240)
    size = (640, 480)
    texts = {name: BoxMap(FORMS[name], size).write(box) for name in ("padded", "picture", "qwen")}
    # The square of 640 has 80 pixels of padding above: (96 + 80) / 640 is 0.275.
    assert texts == {
        "padded": "[0.10, 0.28, 0.50, 0.50]",
        "picture": "[0.10, 0.20, 0.50, 0.50]",
        "qwen": "(100,200),(500,500)",
    }
    with pytest.raises(InputError, match="name the model"):
        BoxMap(FORMS["pixels"], size).write(box)
    assert tuple(FORMS) == BOX_FORMS
    with pytest.raises(InputError, match="boxes: there is no form 'yolo'; use one of padded, picture"):
        config(ImagePolicy(), "yolo")


def test_what_is_not_shown_is_not_written() -> None:
    boxes = box_map(config(ImagePolicy(mode="crop"), "picture"), (200, 100))
    assert boxes.shown() == Box(50, 0, 150, 100)
    assert boxes.write(Box(0, 10, 80, 90)) == "[0.25, 0.10, 0.40, 0.90]"
    with pytest.raises(
        BoxError, match=r"the box \[0, 10, 50, 90\] lies outside of what .*\[50, 0, 150, 100\]"
    ):
        boxes.write(Box(0, 10, 50, 90))


@pytest.mark.parametrize(
    ("form", "text", "found"),
    [
        ("padded", "a dog [0.1, 0.2, 0.3, 0.4] and a cat at (0.5,0.5,0.75,1)", ["a dog", "a cat"]),
        ("picture", "[.1,.2,.3,.4]", [""]),
        ("picture", "[0, 0, 1, 1]", [""]),
        ("qwen", "<ref>a dog</ref><box>(10,20),(300,400)</box>", ["a dog"]),
        (
            "qwen",
            "<|object_ref_start|>a cat<|object_ref_end|><|box_start|>(10,20),(300,400)<|box_end|>",
            ["a cat"],
        ),
        ("qwen", '[{"bbox_2d": [10, 20, 300, 400], "label": "sheep"}]', ["sheep"]),
        ("qwen", '{"label": "ox", "bbox_2d": [10, 20, 300, 400]}', ["ox"]),
        ("qwen", "dog [0.1, 0.2, 0.3, 0.4]", []),  # shares are no thousandths
        ("qwen", "[10, 20, 1300, 400]", []),
        ("picture", "[10, 20, 300, 400]", []),
        ("picture", "[0.3, 0.2, 0.1, 0.4] [0.1, 0.9, 0.3, 0.4]", []),  # swapped corners
        ("picture", "[0.1, 0.2, 0.3] [0.1, 0.2, 0.3, 0.4, 0.5] [1, 2; 3, 4] [-0.1, 0.2, 0.3, 0.4]", []),
    ],
)  # fmt: skip
def test_boxes_are_found_in_answers_with_what_they_are_called(form: str, text: str, found: list[str]) -> None:
    boxes = BoxMap(FORMS[form], (100, 100))
    assert [each.label for each in boxes.find(text)] == found
    assert all(each.box.area > 0 for each in boxes.find(text))


def test_long_blanks_and_brackets_take_no_time() -> None:
    text = "(1, 2)" + " " * 20000 + "[" * 20000 + "1," * 20000
    assert BoxMap(FORMS["qwen"], (100, 100)).find(text) == []


def test_iou() -> None:
    box = Box(0, 0, 10, 10)
    assert box.iou(box) == 1
    assert box.iou(Box(5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert box.iou(Box(10, 0, 20, 10)) == box.iou(Box(20, 20, 30, 30)) == 0
    assert Box(3, 3, 3, 3).iou(Box(3, 3, 3, 3)) == 0


# --- the objects of a row ---


def row(question: str, answer: str, pictures: int = 1, **objects: Any) -> Conversation:
    parts = (*(ImagePart(f"{n}.png") for n in range(pictures)), question)
    boxes = objects.get("boxes", ())
    objects.setdefault("images", (0,) * len(boxes))
    return Conversation((Message("user", parts), Message("assistant", (answer,))), "r", Objects(**objects))


def test_names_and_boxes_take_their_places_in_order() -> None:
    given = row(
        "Find the <ref-object> near <bbox>.", "<ref-object>: <bbox><bbox>", unit="real",
        refs=("dog", "cat"), boxes=((10, 20, 50, 40), (0, 0, 10, 10), (50, 50, 100, 100)),
    )  # fmt: skip
    check_objects(given)
    written = write_boxes(given, [BoxMap(FORMS["picture"], (100, 200))])
    assert [message.text for message in written.messages] == [
        "Find the dog near [0.10, 0.10, 0.50, 0.20].",
        "cat: [0.00, 0.00, 0.10, 0.05][0.50, 0.25, 1.00, 0.50]",
    ]
    assert written.objects is None and written.images == given.images
    mirrored = write_boxes(given, [BoxMap(FORMS["picture"], (100, 200), mirror=True)])
    assert mirrored.messages[0].text == "Find the dog near [0.50, 0.10, 0.90, 0.20]."
    assert holds_boxes(written) and not holds_boxes(given)


def test_a_box_is_written_by_its_own_picture() -> None:
    given = row("?", "<bbox> <bbox>", 2, boxes=((10, 10, 20, 20),) * 2, unit="real", images=(1, 0))
    maps = [BoxMap(FORMS["picture"], (100, 100)), BoxMap(FORMS["picture"], (20, 40))]
    assert write_boxes(given, maps).messages[1].text == "[0.50, 0.25, 1.00, 0.50] [0.10, 0.10, 0.20, 0.20]"


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"boxes": ()}, "box placeholders", "1 <bbox> for 0 boxes"),
        ({"refs": ()}, "box placeholders", "1 <ref-object> for 0 refs"),
        ({"boxes": ((1, 2, float("nan"), 4),)}, "box without numbers", "[1, 2, nan, 4] is not four finite"),
        ({"boxes": ((1, 2, float("inf"), 4),)}, "box without numbers", "[1, 2, inf, 4] is not four finite"),
        ({"boxes": ((3, 2, 1, 4),)}, "swapped corners", "[3, 2, 1, 4] ends before it begins"),
        ({"boxes": ((1, 4, 3, 2),)}, "swapped corners", "[1, 4, 3, 2] ends before it begins"),
        ({"boxes": ((1, 2, 1, 4),)}, "empty box", "[1, 2, 1, 4] has no area"),
        ({"images": (1,)}, "box without a picture", "is of picture 1, the row has 1, counted from 0"),
    ],
)
def test_boxes_that_cannot_be_one_are_told(changes: dict[str, Any], kind: str, words: str) -> None:
    objects = {"refs": ("dog",), "boxes": ((1.0, 2.0, 3.0, 4.0),), **changes}
    check_objects(row("<ref-object>?", "<bbox>", refs=("dog",), boxes=((1.0, 2.0, 3.0, 4.0),)))
    with pytest.raises(BoxError, match=re.escape(words)) as refusal:
        check_objects(row("<ref-object>?", "<bbox>", **objects))
    assert refusal.value.kind == kind
    assert pickle.loads(pickle.dumps(refusal.value)).kind == kind  # rows are checked in processes


def test_placeholders_without_any_objects_are_told() -> None:
    given = replace(row("?", "<bbox>"), objects=None)
    with pytest.raises(BoxError, match="1 <bbox> for 0 boxes"):
        check_objects(given)


def test_boxes_in_all_units_become_pixels_and_those_outside_are_told() -> None:
    def read(corners: tuple[float, ...], unit: str) -> Box:
        [box] = picture_boxes(Objects(boxes=(corners,), unit=unit, images=(0,)), [(200, 100)])
        return box

    expected = Box(20, 10, 100, 50)
    assert read((20, 10, 100, 50), "real") == read((20, 10, 100, 50), "") == expected
    shares = (0.1, 0.1, 0.5, 0.5)
    for unit, corners in (("norm1", shares), ("", shares), ("norm1000", (100, 100, 500, 500))):
        assert read(corners, unit).corners == pytest.approx(expected.corners)
    # What rounding lets out of the picture is cut off.
    assert read((-1, 0, 201.5, 100), "real") == Box(0, 0, 200, 100)
    for corners, unit, words in (
        ((20, 10, 210, 50), "real", "the box [20, 10, 210, 50] reaches out of its picture of 200 x 100"),
        ((-20, 10, 100, 50), "norm1000", "[-20, 10, 100, 50] reaches out"),
        ((300, 10, 400, 50), "real", "reaches out"),
        ((100, 100, 500, 900), "", "read as real because the row has no bbox_type, reaches out"),
    ):
        with pytest.raises(BoxError, match=re.escape(words)) as refusal:
            read(corners, unit)
        assert refusal.value.kind == "box outside the picture"


def test_boxes_are_drawn_in_colours_of_their_own() -> None:
    grey = Image.new("RGB", (200, 100), (128, 128, 128))
    drawn = draw(grey, [("", Box(20, 30, 60, 80)), ("a dog", Box(100.4, 20, 180, 90))])
    assert drawn.getpixel((20, 50)) == drawn.getpixel((59, 79)) == COLOURS[0]
    assert drawn.getpixel((100, 50)) == COLOURS[1]
    assert drawn.getpixel((40, 55)) == drawn.getpixel((60, 80)) == (128, 128, 128)
    assert grey.getcolors() == [(20000, (128, 128, 128))]  # the original stays


def test_what_a_box_has_outside_of_the_picture_is_not_drawn() -> None:
    """As on the page: an answer's box may reach into the padding, and its edge and label stay in view."""
    grey = Image.new("RGB", (200, 100), (128, 128, 128))
    drawn = draw(grey, [("dog", Box(20, -50, 60, 150)), ("cat", Box(20, 110, 60, 150))])
    assert all(drawn.getpixel(place) == COLOURS[0] for place in ((58, 0), (40, 99), (20, 50)))
    assert COLOURS[1] not in {colour for _, colour in drawn.getcolors(200 * 100) or []}
    inside = draw(grey, [("dog", Box(20, 0, 60, 100))])
    assert drawn.tobytes() == inside.tobytes()
