"""The rows of pumice-tiny: labels follow from captions, are balanced, split and repeatable."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

RECIPE = Path(__file__).parents[2] / "projects" / "pumice-tiny"
MODULES = (
    *("attributes", "base", "boxes", "captions", "coco", "composites", "crops", "flickr", "follow_up"),
    *("grammar", "labels", "mentions", "nouns", "presence", "refusal", "scene_rows", "text_only", "vqa"),
)


@pytest.fixture(scope="module")
def rows() -> Any:
    """The recipe's modules by name; its folder is on the path only while they are imported."""
    sys.path.insert(0, str(RECIPE))
    try:
        modules = {name: importlib.import_module(f"rows.{name}") for name in MODULES}
    finally:
        sys.path.remove(str(RECIPE))
    return SimpleNamespace(**modules)


@pytest.fixture(scope="module")
def build(rows: Any, script: Callable[[str], ModuleType]) -> ModuleType:
    return script("build")


def photo(rows: Any, *captions: str, name: str = "p") -> Any:
    return rows.base.Photo(name, f"flickr8k/images/{name}.jpg", captions)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("two dogs  run in snow .", "Two dogs run in snow."),
        ("A man 's hat is red , and blue", "A man's hat is red, and blue."),
        ("a girl jumps !", None),  # under four words
        ("A Chinese Dragon at a", None),  # broken off
        ("A dog looks to the left .", None),  # would be wrong of the mirrored picture
        ("A MAN RIDES A HORSE .", "A man rides a horse."),
    ],
)
def test_captions_are_cleaned(rows: Any, raw: str, clean: str | None) -> None:
    assert rows.flickr.clean_caption(raw) == clean


def test_captions_that_agree_come_first(rows: Any) -> None:
    photos = [
        photo(
            rows, "A sunny day of fun.", "A dog runs on grass.", "A brown dog runs on the grass.", name="a"
        ),
        photo(
            rows, "Two men climb a rock.", "Two men climb a tall rock.", "Friends enjoy themselves.", name="b"
        ),
        photo(rows, "A boy swims in a pool.", name="c"),
    ]
    ranked = rows.captions.agreeing(photos)
    assert ranked[0][-1] == "A sunny day of fun."
    assert ranked[1][-1] == "Friends enjoy themselves."
    assert ranked[2] == ["A boy swims in a pool."]
    assert [sorted(captions) for captions in ranked] == [sorted(p.captions) for p in photos]


@pytest.mark.parametrize(
    ("captions", "yes", "no", "open_"),
    [
        (
            ("A black dog runs through the field.", "A puppy is running outside."),
            {"dog", "animal"},
            {"snow", "bus", "car"},
            {"grass", "tree"},
        ),
        (
            ("A man surfs a wave.", "A surfer in the ocean.", "The man is on a surfboard."),
            {"man", "person", "surfboard", "wave", "ocean"},
            {"dog", "woman"},
            {"water", "beach", "wetsuit"},
        ),
        (
            ("A woman and a crowd.", "A woman in a crowd."),
            {"woman", "person", "crowd"},
            {"dog"},
            {"man", "child"},
        ),
        (("A man eats a hot dog.", "A man with a hot dog."), {"man", "food"}, {"dog", "animal"}, {"table"}),
        (("A boy rides a dirt bike.", "A boy on a dirt bike."), {"motorcycle", "boy"}, {"dog"}, {"bicycle"}),
        (("A girl smiles at the camera.", "A girl looks at the camera."), {"girl"}, {"camera"}, {"dress"}),
        (("A man without a shirt runs.", "A man with no shirt is running."), {"man"}, {"dog"}, {"jeans"}),
    ],
)
def test_yes_no_and_open(rows: Any, captions: Any, yes: set[str], no: set[str], open_: set[str]) -> None:
    judged = rows.mentions.mentions(captions)
    assert yes - {"water"} <= judged.yes.keys() and no <= judged.no
    assert not open_ & judged.no
    assert not judged.no & judged.yes.keys()


def test_a_water_sport_means_water(rows: Any) -> None:
    judged = rows.mentions.mentions(("A man swims in a lake.", "Someone is swimming."))
    assert "water" in judged.yes


def test_verbs_are_not_things(rows: Any) -> None:
    judged = rows.mentions.mentions(
        ("A boy swings a bat and slides down.", "A boy swings the bat, waves at us.")
    )
    assert not {"swing", "slide", "wave"} & judged.yes.keys() and "swing" not in judged.no


def test_one_caption_is_neither_yes_nor_no(rows: Any) -> None:
    judged = rows.mentions.mentions(("A dog in the snow.", "A dog runs.", "A brown dog."))
    assert "snow" not in judged.yes and "snow" not in judged.no


def test_a_person_may_hide_a_woman_unless_a_rival_is_named(rows: Any) -> None:
    assert "woman" not in rows.mentions.mentions(("A person rides.", "Someone on a horse.")).no
    assert "woman" in rows.mentions.mentions(("A man rides a horse.", "A person rides.", "The man.")).no


def test_every_group_and_implication_is_known(rows: Any) -> None:
    for noun in rows.nouns.NOUNS.values():
        assert noun.forms and not noun.means & noun.maybe
    assert "puppy" in rows.nouns.NOUNS["animal"].means
    assert {"field", "lawn"} <= rows.nouns.NOUNS["grass"].means | rows.nouns.NOUNS["grass"].maybe
    assert len(rows.nouns.NOUNS) >= 120


def crowd_of_photos(rows: Any) -> list[Any]:
    scenes = (
        ("A dog runs in the snow.", "A brown dog in the snow.", "The dog is running in snow."),
        ("A man plays a guitar.", "A man with a guitar.", "The man is playing a guitar."),
        ("A woman rides a horse.", "A woman on a horse.", "The woman is riding a horse."),
        ("A boy jumps into a pool.", "The boy is jumping into the pool.", "A boy in a pool."),
    )
    return [photo(rows, *scenes[n % 4], name=f"{n:03}") for n in range(80)]


def test_presence_is_balanced_per_noun(rows: Any) -> None:
    chosen = rows.presence.choose(crowd_of_photos(rows), seed=0)
    yes = Counter(q.name for q in chosen if q.answer)
    no = Counter(q.name for q in chosen if not q.answer)
    assert sum(yes.values()) > 80
    assert abs(sum(yes.values()) - sum(no.values())) <= 0.1 * sum(yes.values())
    assert all(abs(yes[name] - no[name]) <= 3 for name in yes)
    for question in chosen:
        judged = rows.mentions.mentions(question.photo.captions)
        name = re.sub(r"^(doing|dog) ", "", question.name)
        assert question.answer or name in judged.no | judged.doing_no


def test_the_prompt_decides_the_form_of_the_answer(rows: Any) -> None:
    for entry in rows.presence.presence_rows(rows.presence.choose(crowd_of_photos(rows), seed=1), seed=1):
        human, answer = (turn["value"] for turn in entry["conversations"])
        asks_bare = re.search(r"yes or no|single word", human, re.IGNORECASE)
        assert (answer in ("Yes", "No")) == bool(asks_bare)
        assert re.match(r"(Yes|No)\b", answer)


@pytest.mark.parametrize(
    ("caption", "clause"),
    [
        ("A man in a red hat is riding a bike down a road, smiling.", ("man", "riding a bike down a road")),
        ("Two black dogs running in the snow.", ("dogs", "running in the snow")),
        ("A girl plays with a ball and laughs.", ("girl", "playing with a ball")),
        ("The dog lays on the bed.", ("dog", "lying on the bed")),
        ("A man and a woman are walking.", None),
        ("Snow on a roof.", None),
    ],
)
def test_clauses_are_read(rows: Any, caption: str, clause: tuple[str, str] | None) -> None:
    parsed = rows.grammar.read_clause(caption)
    assert (parsed and (parsed.head, parsed.action)) == clause


def test_counts_and_colours_need_agreement(rows: Any) -> None:
    agreed = photo(rows, "Two brown dogs run.", "Two dogs play.", "Some dogs run outside.")
    assert rows.attributes.counts(agreed) == {"dog": 2}
    disputed = photo(rows, "Two dogs run.", "Two dogs play.", "Three dogs run outside.")
    assert rows.attributes.counts(disputed) == {}
    coloured = photo(rows, "A dog with a red ball.", "A dog chases a red ball.", "A dog runs.")
    assert rows.attributes.colours(coloured) == {"ball": "red"}
    assert rows.attributes.colours(photo(rows, "A red ball.", "A blue ball.", "A red ball rolls.")) == {}
    both = photo(rows, "A brown and white dog runs.", "The brown and white dog.")
    assert rows.attributes.colours(both) == {"dog": "brown and white"}


def test_refusals_are_balanced_and_true(rows: Any) -> None:
    photos = crowd_of_photos(rows)
    by_image = {p.image: p for p in photos}
    photo_rows = rows.refusal.refusal_rows(photos, seed=0)
    absent = [r for r in photo_rows if r["id"].endswith("absent")]
    assert absent and len(absent) <= 0.65 * len(photo_rows)
    for entry in absent:
        judged = rows.mentions.mentions(by_image[entry["image"]].captions)
        assert any(name in entry["conversations"][0]["value"].lower() for name in judged.no)


def test_articles_and_names(rows: Any) -> None:
    assert [rows.base.with_article(w) for w in ("umbrella", "unicycle", "hourglass", "dog")] == [
        "an umbrella",
        "a unicycle",
        "an hourglass",
        "a dog",
    ]


def test_arithmetic_is_right(rows: Any) -> None:
    text_rows = rows.text_only.text_rows(0)
    assert len(text_rows) >= 600 and all("image" not in r for r in text_rows)
    pattern = re.compile(r"^(\d+) (plus|minus|times|divided by) (\d+) is (\d+)\.$")
    checked = 0
    for entry in text_rows:
        for turn in entry["conversations"]:
            if match := pattern.match(turn["value"]):
                a, b, result = int(match[1]), int(match[3]), int(match[4])
                right = {"plus": a + b, "minus": a - b, "times": a * b, "divided by": a / b}[match[2]]
                assert right == result
                checked += 1
    assert checked > 30


def test_position_answers_agree_with_the_picture(rows: Any, tmp_path: Path) -> None:
    """The colour under each thing's centre is the colour that the scene claims."""
    checked = 0
    for number in range(40):
        scene = rows.composites.draw_scene(number, "train", [], tmp_path, tmp_path, [], seed=3)
        with Image.open(tmp_path / scene.image) as picture:
            assert picture.size == (224, 224)
            for placed in scene.things:
                ink = rows.composites.INK[placed.thing.colour]
                color = picture.convert("RGB").getpixel((placed.x, placed.y))
                assert max(abs(a - b) for a, b in zip(ink, color, strict=True)) < 40
        turns = rows.scene_rows.scene_turns(scene, [p.thing for p in scene.things], seed=3)
        if scene.arrangement == "row":
            left, right = scene.things[0].thing.name, scene.things[-1].thing.name
            for _, answer in turns["position"]:
                if match := re.search(
                    rf"the ({left}|{right}) is to the (left|right) of", answer, re.IGNORECASE
                ):
                    assert (match[1] == left) == (match[2] == "left")
                    checked += 1
    assert checked > 10


def make_photos(root: Path, number: int) -> None:
    """A small picture folder in the layout of the real one."""
    captions = (
        "A brown dog runs through the snow .",
        "A dog is running in the snow .",
        "The dog plays in deep white snow .",
        "A man in a red shirt rides a bike down a street .",
        "A man is riding a bike on a street .",
    )
    images, annotations = [], []
    (root / "flickr8k" / "images").mkdir(parents=True)
    for n in range(number):
        name = f"{n:03}.jpg"
        Image.new("RGB", (32, 32), (n * 7 % 256, 90, 90)).save(root / "flickr8k" / "images" / name)
        images.append({"id": n, "file_name": name})
        start = 0 if n % 2 else 3
        for k, text in enumerate(captions[start : start + 3]):
            annotations.append({"id": 5 * n + k, "image_id": n, "caption": text})
    content = {"images": images, "annotations": annotations}
    (root / "flickr8k" / "captions.json").write_text(json.dumps(content))
    folder = root / "imagenet-one-per-class" / "images"
    folder.mkdir(parents=True)
    labels = []
    for key, name in (("n02099601", "golden retriever"), ("n01440764", "tench"), ("n03594734", "jean")):
        Image.new("RGB", (32, 32)).save(folder / f"{key}.jpg")
        labels.append({"file_name": f"{key}.jpg", "wordnet_id": key, "name": name})
    (folder.parent / "labels.json").write_text(json.dumps(labels))


def read_all(folder: Path) -> dict[str, list[Any]]:
    return {
        path.relative_to(folder).as_posix(): [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.rglob("*.jsonl"))
    }


def test_end_to_end(build: ModuleType, tmp_path: Path) -> None:
    make_photos(tmp_path / "photos", 24)
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        build.build(tmp_path / "photos", out, seed=5, composites={"train": 6, "val": 2}, validation=6)
    first, second = (read_all(out) for out in outs)
    assert first == second  # the seed decides everything
    held = {entry["image"] for entry in json.loads((outs[0] / "val" / "captions.json").read_text())}
    assert len(held) == 6
    ids: set[str] = set()
    for name, entries in first.items():
        if name == "val/presence.jsonl":
            assert Counter(e["answer"] for e in entries).keys() <= {"yes", "no"}
            assert {e["image"] for e in entries} <= held
            continue
        for entry in entries:
            speakers = [turn["from"] for turn in entry["conversations"]]
            assert speakers == ["human", "gpt"] * (len(speakers) // 2)
            assert all(turn["value"].strip() for turn in entry["conversations"])
            text = json.dumps(entry["conversations"])
            assert "{" not in text.replace('{"from"', "") and text.count("<image>") == ("image" in entry)
            if "image" in entry:
                assert (tmp_path / "photos" / entry["image"]).exists() or (outs[0] / entry["image"]).exists()
            if name.startswith("train/"):
                assert entry.get("image") not in held
                assert (name, entry["id"]) not in ids
                ids.add((name, entry["id"]))
    answers = {turn["value"] for e in first["train/naming.jsonl"] for turn in e["conversations"]}
    assert any("a golden retriever" in a.lower() for a in answers) and any(
        "a pair of jeans" in a for a in answers
    )
    summary = json.loads((outs[0] / "summary.json").read_text())
    assert summary["train/captions"]["pictures"] == 18


def scene(
    rows: Any, *labels: str, name: str = "p", boxes: Any = None, captions: tuple[str, ...] = (), **more: Any
) -> Any:
    shown = rows.base.Photo(name, f"coco/images/{name}.jpg", captions)
    scene_fields = {"vqa": (), "statements": (), **more}
    return rows.coco.Scene(shown, frozenset(labels), boxes, scene_fields["vqa"], scene_fields["statements"])


def asked(question: str, *answers: str, image: str = "p.jpg") -> dict[str, Any]:
    return {"image": image, "question": question, "answers": list(answers), "answer_type": "other"}


def test_labels_deny_small_things_only_where_every_thing_has_its_box(rows: Any) -> None:
    labelled = scene(rows, "person")
    assert {"dog", "bus"} <= set(labelled.absent())
    assert not rows.coco.SMALL & set(labelled.absent())
    assert {"fork", "remote"} <= set(scene(rows, "person", boxes=()).absent())


def test_categories_are_asked_as_often_with_yes_as_with_no(rows: Any) -> None:
    some = [
        scene(rows, *(("dog", "frisbee") if n % 2 else ("cat", "couch", "fork")), name=f"p{n}")
        for n in range(40)
    ]
    questions = rows.labels.label_questions(some, 0)
    counts = Counter((q.name, q.answer) for q in questions)
    assert {name for name, _ in counts} == {"dog", "frisbee", "cat", "couch"}  # nobody denies a fork
    assert all(counts[name, True] == counts[name, False] > 5 for name, _ in counts)


def test_categories_name_rooms_food_and_sports_only_where_they_are_sure(rows: Any) -> None:
    room, sport = rows.labels.room_of, rows.labels.sport_of
    assert room(scene(rows, "toilet", "sink")) == "bathroom"
    assert room(scene(rows, "oven", "refrigerator", "person")) == "kitchen"
    assert room(scene(rows, "bed", "toilet")) is None
    assert room(scene(rows, "bed", "surfboard")) is None
    assert sport(scene(rows, "person", "skis")) == "skiing"
    assert sport(scene(rows, "skis")) is None
    assert sport(scene(rows, "person", "skis", "snowboard")) is None
    assert rows.labels.only(scene(rows, "pizza", "person"), "food") == "pizza"
    assert rows.labels.only(scene(rows, "pizza", "cake"), "food") is None


def test_answers_of_three_people_are_learned_in_proportion(rows: Any) -> None:
    answers = ["yes"] * 6 + ["no"] * 3 + ["maybe"]
    assert rows.vqa.agreed(answers) == [("yes", 2), ("no", 1)]
    assert rows.vqa.agreed(["a"] * 10) == [("a", 4)]
    assert rows.vqa.agreed(["a", "a", "b", "b", "c", "d"]) == []
    turns = rows.vqa.vqa_turns(asked("Is it so?", *answers), 0)
    assert sorted(answer.rstrip(".") for _, answer in turns) == ["No", "Yes", "Yes"]
    assert len({question for question, _ in turns}) == 1


def test_what_tells_sides_or_writing_is_never_mirrored(rows: Any) -> None:
    questions = (asked("Who is on the left?", *["man"] * 5), asked("What color is it?", *["red"] * 5))
    plain, numbers, sided = rows.vqa.vqa_rows([scene(rows, vqa=questions)], 0)
    assert {r["conversations"][0]["value"].splitlines()[1][:4].lower() for r in sided} == {"who "}
    assert len(plain) == len(sided) == 4 and numbers == []
    assert rows.coco.tells_sides("What does the sign say?") and not rows.coco.tells_sides("Is it signal red?")


def test_one_is_the_answer_to_a_third_of_what_would_be_answered_so(rows: Any) -> None:
    scenes = [
        scene(rows, name=f"p{n}", vqa=(asked(f"How many dogs {n}?", *[answer] * 10),))
        for n in range(60)
        for answer in ("1", "2")
    ]
    plain, numbers, sided = rows.vqa.vqa_rows(scenes, 0)
    assert plain == sided == []
    shown = Counter(r["conversations"][1]["value"].rstrip(".") for r in numbers)
    assert shown["2"] == 60 * 4 and 10 * 4 <= shown["1"] <= 30 * 4


def test_boxes_tell_numbers_and_sides(rows: Any) -> None:
    box = rows.coco.Box
    dogs = (box("dog", 0.0, 0.2, 0.2, 0.6), box("dog", 0.7, 0.2, 0.9, 0.6))
    far = (box("car", 0.5, 0.5, 0.51, 0.51), box("cat", 0.7, 0.1, 1.0, 0.5))
    dog_scene = scene(rows, "dog", "car", "cat", boxes=dogs + far)
    texts = {question.lower(): answer for question, answer in rows.boxes.count_turns(dog_scene, 0)}
    assert any("dogs" in q and re.search("2|two", a) for q, a in texts.items())
    assert any("cats" in q and re.search("1|one", a) for q, a in texts.items())
    assert not any("cars" in question for question in texts)  # one that is too small may have neighbours
    assert sum(re.search(r"\b(0|no)\b", answer) is not None for answer in texts.values()) == 2
    sides = rows.boxes.side_turns(dog_scene, 0)
    assert len(sides) == 1 and "cat" in sides[0][0] and "right" in sides[0][1].lower()


def test_a_following_answer_says_more_than_the_ones_before(rows: Any) -> None:
    some = [
        scene(rows, "person", "skis", name=f"p{n}", vqa=(asked("What sport?", *["skiing"] * 10),))
        for n in range(60)
    ]
    row_list = rows.follow_up.follow_up_rows(some, {}, 0)
    assert len(row_list) > 40
    for conversation in row_list:
        turns = conversation["conversations"]
        answers = [rows.follow_up.content(turn["value"]) for turn in turns[1::2]]
        before: set[str] = set()
        for answer in answers:
            assert answer <= {"yes", "no"} or not answer <= before
            before |= answer
        assert len(answers) > 1
    assert rows.follow_up.content("A cat.") == rows.follow_up.content("cat") == {"cat"}


def test_a_list_of_things_is_not_followed_by_whether_they_are_there(rows: Any) -> None:
    some = [scene(rows, "dog", "bed", name=f"p{n}") for n in range(40)]
    question = {s.photo.name: [rows.presence.Question(s.photo, "dog", True, "yes")] for s in some}
    row_list = rows.follow_up.follow_up_rows(some, question, 0)
    texts = [[turn["value"] for turn in row["conversations"]] for row in row_list]
    listed = [row for row in texts if " and a" in row[1]]
    assert listed
    assert not any(re.search(r"\bdogs?\b", turn) for row in listed for turn in row[2::2])


def test_the_coco_split_is_by_name(rows: Any) -> None:
    some = [scene(rows, "dog", name=f"p{n}") for n in range(20)]
    train, held = rows.coco.split(some, 5)
    _, same = rows.coco.split(some[::-1], 5)
    assert len(held) == 5 and len(train) == 15
    assert {s.photo.name for s in held} == {s.photo.name for s in same}
    assert {s.photo.name for s in held} == rows.base.held_names((s.photo.name for s in some), 5)


def make_coco(root: Path, count: int) -> None:
    """Photographs of dogs and cats in COCO's files: all labelled, some captioned, boxed, asked and stated."""
    folder = root / "coco"
    folder.mkdir()
    names = [f"{number:012}.jpg" for number in range(count)]
    animals = ["dog" if number % 2 else "cat" for number in range(count)]
    pairs = list(zip(names, animals, strict=True))
    images = [{"id": number, "file_name": name} for number, name in enumerate(names[: count // 2])]
    captions = [
        {"image_id": image["id"], "caption": f"a {pairs[image['id']][1]} {verb} on a bed"}
        for image in images
        for verb in ("sleeps", "sits", "rests")
    ]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    lines = {
        "labels": [{"image": name, "labels": [animal, "bed"]} for name, animal in pairs],
        "objects": [
            {"image": n, "objects": [{"name": a, "box": [0.1, 0.1, 0.3, 0.5]}], "complete": True}
            for n, a in pairs
        ],
        "vqa": [{"question_id": n, **asked(f"What animal {n}?", *[a] * 10, image=n)} for n, a in pairs],
        "vsr": [{"image": n, "statement": f"The {a} is on the bed.", "label": True} for n, a in pairs],
    }
    for name, entries in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))


def test_coco_is_read_split_and_written_beside_the_rest(build: ModuleType, tmp_path: Path) -> None:
    make_photos(tmp_path, 12)
    make_coco(tmp_path, 20)
    out = tmp_path / "out"
    build.build(tmp_path, out, composites={}, validation=4, coco_validation=6)
    written = read_all(out)
    for source in ("captions", "presence", "list", "naming", "counting", "sides", "statements"):
        assert written[f"train/coco_{source}.jsonl"], source
    held = {entry["image"] for entry in written["val/coco_list.jsonl"]}
    assert len(held) == 6
    for name, entries in written.items():
        if name.startswith("train/"):
            assert held.isdisjoint(entry.get("image") for entry in entries), name
    asked_of = {entry["image"] for entry in written["val/vqa_test.jsonl"]}
    captioned = {e["image"] for e in json.loads((out / "val" / "coco_captions.json").read_text())}
    assert asked_of == held and captioned <= held
    answers = Counter(entry["answer"] for entry in written["val/coco_presence.jsonl"])
    assert answers["yes"] == answers["no"] > 0


def test_training_rows_show_crops_where_they_stay_right(rows: Any, tmp_path: Path) -> None:
    image = "coco/images/a.jpg"
    (tmp_path / image).parent.mkdir(parents=True)
    Image.effect_noise((64, 48), 90).save(tmp_path / image)
    sources = {
        name: [{"id": name, "image": image, "conversations": []}]
        for name in ("train/captions", "train/coco_list", "train/vqa_numbers", "val/captions")
    }
    out = tmp_path / "out"
    rows.crops.crop_pictures(sources, tmp_path, out, share=1, seed=3)
    shown = {name: source[0]["image"] for name, source in sources.items()}
    assert shown["train/captions"] == shown["train/coco_list"] == f"crops/3/{image}"
    assert shown["train/vqa_numbers"] == shown["val/captions"] == image
    with Image.open(out / f"crops/3/{image}") as made, Image.open(tmp_path / image) as whole:
        assert made.size == whole.size and made.convert("L").tobytes() != whole.convert("L").tobytes()
    rows.crops.crop_pictures(sources | {"train/captions": [{"image": image}]}, tmp_path, out, share=0, seed=4)
    assert not (out / "crops/4").exists()
