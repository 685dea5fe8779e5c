"""The rows of pumice-tiny that captions and drawings give: labels follow from them, and are balanced."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


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
    text_rows = rows.text_only.text_rows(0, "train", 900)
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


def test_held_out_questions_without_a_picture_are_not_those_of_training(rows: Any) -> None:
    def questions(entries: list[Any]) -> set[str]:
        phrase = rows.base.SINGLE_PHRASE
        turns = [turn["value"].replace(phrase, "") for e in entries for turn in e["conversations"][::2]]
        return {turn.lower().rstrip("?.") for turn in turns}

    train = rows.text_only.text_rows(0, "train", 900)
    held_out = rows.text_only.text_rows(0, "val", 60, train)
    assert len(held_out) == 60
    assert not questions(train) & questions(held_out)
    assert questions(train) & questions(rows.text_only.text_rows(0, "val", 60))


def test_casual_questions_keep_the_mark_within(rows: Any) -> None:
    question, dice = "Is it a dog? Or what is it?", random.Random(0)
    assert {rows.base.casual(question, dice) for _ in range(300)} == {
        question, "is it a dog? Or what is it?", "Is it a dog? Or what is it", "is it a dog? Or what is it",
    }  # fmt: skip


def test_things_that_a_photograph_may_show_too_are_not_counted(rows: Any) -> None:
    composites = rows.composites
    for name, plain, counted in (("zebra", False, 0), ("zebra", True, 1), ("star", False, 1)):
        thing = composites.Thing(name, "red", Image.new("RGBA", (4, 4)))
        scene = composites.Scene("x.jpg", "count", (composites.Placed(thing, 9, 9),), plain)
        turns = rows.scene_rows.scene_turns(scene, [thing], seed=3)["counting"]
        assert sum(name in question for question, _ in turns) == counted


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
