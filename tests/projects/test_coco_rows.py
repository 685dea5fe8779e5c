"""The rows of pumice-tiny that COCO's labels, boxes and questions give."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any


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
