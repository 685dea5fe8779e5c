"""Rows on what somebody rides or holds, what is behind them, and which sport it is."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

ENDING = re.compile(r"( (in this|in the|of the) (image|picture|photo|photograph))?\??$")


def objects(rows: Any, *captions: str) -> set[tuple[str, str]]:
    """Every question without its ending, with the last words of its answer, of many drawings."""
    photo = rows.base.Photo("p", "flickr8k/images/p.jpg", captions)
    found = set()
    for seed in range(40):
        for question, answer in rows.objects.object_turns(photo, random.Random(seed)):
            asked = ENDING.sub("", question.split("\n")[0].lower())
            found.add((asked, re.sub(r"^the \w+ is \w+ (in )?", "", answer.lower().rstrip("."))))
    return found


def sport(rows: Any, *captions: str) -> set[str]:
    photo = rows.base.Photo("p", "flickr8k/images/p.jpg", captions)
    turns = [rows.objects.sport_turn(photo, random.Random(seed)) for seed in range(40)]
    return {turn[1].lower().rstrip(".").split(" is ")[-1].split("playing ")[-1] for turn in turns if turn}


def test_two_captions_name_the_thing(rows: Any) -> None:
    said = "A man in a red hat is riding a brown horse down a road."
    assert objects(rows, said, "A horse on a road.") == {
        ("what is the man riding", "a horse"),
        ("what is the man riding", "horse"),
    }
    assert objects(rows, said, "A cowboy on a road.") == set()


def test_an_adjective_needs_two_captions_too(rows: Any) -> None:
    answers = {
        answer for _, answer in objects(rows, "A man is riding an old red sled.", "A red sled and a man.")
    }
    assert answers == {"a red sled", "red sled"}


@pytest.mark.parametrize(
    "captions",
    [
        ("A man is riding a horse.", "Another man watches a horse."),  # which man?
        ("The kids are holding hands.", "Two kids hold hands."),  # no thing
        ("A dog is running in a field of grass.", "A field."),  # what it is a field of may be asked
        ("A woman is standing next to a dog preparing food.", "A dog and food."),
        ("The dog is catching ball.", "A ball."),  # broken English
    ],
)
def test_what_is_in_doubt_is_not_asked(rows: Any, captions: tuple[str, ...]) -> None:
    assert objects(rows, *captions) == set()


def test_things_that_are_not_counted_have_no_article(rows: Any) -> None:
    answers = objects(rows, "A dog is running in a snow.", "Snow.")
    assert {answer for _, answer in answers} == {"snow"}


def test_what_one_stands_in_front_of_is_behind_one(rows: Any) -> None:
    said = "A woman is standing in front of a fountain."
    assert objects(rows, said, "A fountain.") == {
        ("what is behind the woman", "a fountain"),
        ("what is behind the woman", "fountain"),
    }
    assert objects(rows, "A woman is sitting in front of a computer.", "A computer.") == set()


def test_the_background_is_asked_about(rows: Any) -> None:
    found = objects(rows, "Two cars with mountains in the background.", "Mountains and cars.")
    assert found == {("what is in the background", "mountains")}


def test_at_most_two_questions_of_a_photo(rows: Any) -> None:
    captions = (
        "A man is riding a horse.",
        "A man is holding a rope.",
        "A man is chasing a cow.",
        "Horse, rope, cow.",
    )
    photo = rows.base.Photo("p", "flickr8k/images/p.jpg", captions)
    assert len(objects(rows, *captions)) == 6
    assert len(rows.objects.object_turns(photo, random.Random(0))) == rows.objects.KEPT


def test_sports(rows: Any) -> None:
    assert sport(rows, "A boy plays soccer.", "Boys with a soccer ball.") == {"soccer"}
    assert sport(rows, "A man surfs a wave.", "A surfer in the sea.") == {"surfing"}
    assert sport(rows, "A man surfs a wave.", "A man in the sea.") == set()  # one caption
    assert sport(rows, "A boy plays soccer.", "Soccer.", "Boys play rugby.") == set()  # they disagree
    assert sport(rows, "A dog with a football.", "A football and a dog.") == set()


def test_rows_have_names_of_their_own(rows: Any) -> None:
    photo = rows.base.Photo(
        "p", "flickr8k/images/p.jpg", ("A man rides a wave on a surfboard.", "A surfer is riding a wave.")
    )
    written = rows.objects.object_rows([photo], 0)
    assert [entry["id"] for entry in written] == [f"objects-p-{n}" for n in range(len(written))]
    assert len(written) == 2
