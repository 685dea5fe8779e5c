"""Several turns about one photo, taken from what the other sources would ask of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rows.attributes import colour_turns, counting_turns
from rows.base import SINGLE_PHRASE, Photo, Row, rng, row
from rows.happening import happening_turns
from rows.presence import Question, phrase
from rows.prompts import QUESTIONS

SHARE = 0.4  # of the photos


def conversation_rows(
    photos: Sequence[Photo], questions: Mapping[str, Sequence[Question]], seed: int
) -> list[Row]:
    """Rows of two to four turns. questions: presence questions by photo name."""
    rows = []
    for photo in photos:
        random_ = rng(seed, "conversation", photo.name)
        if random_.random() > SHARE:
            continue
        turns = [(random_.choice(QUESTIONS), random_.choice(photo.captions))]
        asked = list(questions.get(photo.name, ()))
        random_.shuffle(asked)
        details = [*happening_turns(photo, seed), *counting_turns(photo, seed), *colour_turns(photo, seed)]
        random_.shuffle(details)
        turns += details[:2]
        turns += [phrase(question, random_, short=random_.random() < 0.3) for question in asked[:2]]
        opening = [turn for turn in turns[:1] if random_.random() < 0.75]
        later_turns = turns[1:]
        random_.shuffle(later_turns)
        chosen = (opening + later_turns)[: random_.choice((2, 3, 3, 4))]
        if random_.random() < 0.5:  # people rarely repeat LLaVA's suffix within one conversation
            chosen = [turn for turn in chosen if SINGLE_PHRASE not in turn[0]]
        if len(chosen) >= 2:
            rows.append(row(f"conversation-{photo.name}", photo.image, chosen))
    return rows
