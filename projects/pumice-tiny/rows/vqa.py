"""Questions that people asked of COCO photographs, with their answers, and what they stated of them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rows.base import SINGLE_PHRASE, Row, capital, casual, rng, row
from rows.coco import Scene, tells_sides
from rows.presence import forced

Turn = tuple[str, str]
AGREED = 3  # people who gave an answer before it may be learned
SHOWN = 4  # answers of a question whose people are all of one mind
STATEMENT = (
    "Is it true that {s}?",
    "Is it right that {s}?",
    "Would you say that {s}?",
    "Is this statement true? {S}",
    "True or not: {S}",
)


def agreed(answers: Sequence[str]) -> list[tuple[str, int]]:
    """Answers that at least three people gave, each with its share of SHOWN, one at least."""
    counts = [(answer, count) for answer, count in Counter(answers).most_common() if count >= AGREED]
    return [(answer, max(1, round(SHOWN * count / len(answers)))) for answer, count in counts]


def answer_turn(question: str, answer: str, random_: random.Random) -> Turn:
    """Most often with LLaVA's words for a short answer, which is then bare, as VQA counts it."""
    if random_.random() < 0.6:
        return question + SINGLE_PHRASE, capital(answer)
    return casual(question, random_), f"{capital(answer)}."


def vqa_turns(asked: dict[str, Any], seed: int) -> list[Turn]:
    """The question under one wording with each of its answers, as often as their share."""
    name = f"{asked['image']}/{asked['question']}"
    turns = []
    for answer, times in agreed(asked["answers"]):
        question = answer_turn(asked["question"], answer, rng(seed, "vqa", name))
        turns += [question] * times
    return turns


def vqa_rows(scenes: Sequence[Scene], seed: int) -> tuple[list[Row], list[Row], list[Row]]:
    """(rows whose pictures may be mirrored, those of them on numbers, rows whose pictures may not).

    A third of the questions on numbers keep the answer "1", or it would always win.
    """
    plain: list[Row] = []
    numbers: list[Row] = []
    sided: list[Row] = []
    for scene in scenes:
        for index, asked in enumerate(scene.vqa):
            texts = (asked["question"], *asked["answers"])
            counts = asked["question"].lower().startswith("how many")
            rows = sided if any(map(tells_sides, texts)) else numbers if counts else plain
            name = f"vqa-{scene.photo.name}-{index}"
            keep_one = not counts or rng(seed, "one", name).random() < 1 / 3
            for number, turn in enumerate(vqa_turns(asked, seed)):
                if keep_one or turn[1].rstrip(".") != "1":
                    rows.append(row(f"{name}-{number}", scene.photo.image, [turn]))
    return plain, numbers, sided


def statement_turn(statement: dict[str, Any], random_: random.Random) -> Turn:
    """A statement as a question for yes or no."""
    text = statement["statement"].strip()
    question = random_.choice(STATEMENT).format(s=text[:1].lower() + text[1:].rstrip("."), S=text)
    answer = "Yes" if statement["label"] else "No"
    if random_.random() < 0.6:
        return forced(question, random_), answer
    return question, f"{answer}."


def statement_rows(scenes: Sequence[Scene], seed: int) -> list[Row]:
    """Every statement on where things are. None of the pictures may be mirrored."""
    return [
        row(
            f"statement-{scene.photo.name}-{number}",
            scene.photo.image,
            [statement_turn(statement, rng(seed, "statement", scene.photo.name, statement["statement"]))],
        )
        for scene in scenes
        for number, statement in enumerate(scene.statements)
    ]


def vqa_test(scenes: Sequence[Scene]) -> list[Row]:
    """Held-out questions: {"id", "image", "question", "answers", "answer_type"}."""
    return [
        {
            "id": f"vqa-val-{asked['question_id']}",
            "image": scene.photo.image,
            "question": asked["question"],
            "answers": asked["answers"],
            "answer_type": asked["answer_type"],
        }
        for scene in scenes
        for asked in scene.vqa
    ]
