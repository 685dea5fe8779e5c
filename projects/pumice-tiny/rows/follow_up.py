"""Two or three questions about one COCO photograph, each answered from the picture, not from the talk before.

A small model copies its last answer where training lets it: an answer that says only what was said before is
left out, but for yes and no, whose second is independent of the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rows.base import SINGLE_PHRASE, Row, rng, row
from rows.boxes import count_turns
from rows.coco import CATEGORIES, Scene, tells_sides
from rows.labels import list_turn, naming_turns
from rows.presence import Question, phrase
from rows.prompts import CAPTION
from rows.vqa import agreed, answer_turn

Turn = tuple[str, str]
YES_NO = ("yes", "no")
EMPTY = ("a", "an", "the", "this", "that", "there", "is", "are", "it", "on", "in", "at", "of", "and", "one")


def content(answer: str) -> frozenset[str]:
    """The words of an answer that say something; of one that begins with yes or no that word alone."""
    words = answer.lower().rstrip(".").replace(",", "").split()
    return frozenset(words[:1] if words and words[0] in YES_NO else set(words).difference(EMPTY))


def follow_up_rows(
    scenes: Sequence[Scene], questions: Mapping[str, Sequence[Question]], seed: int
) -> list[Row]:
    """One conversation for every photograph with two different things to ask. questions: by photo's name."""
    rows = []
    for scene in scenes:
        turns = _turns(scene, questions.get(scene.photo.name, ()), seed)
        if len(turns) > 1:
            rows.append(row(f"follow-up-{scene.photo.name}", scene.photo.image, turns))
    return rows


def _turns(scene: Scene, questions: Sequence[Question], seed: int) -> list[Turn]:
    random_ = rng(seed, "follow-up", scene.photo.name)
    # 1. What may open: a caption or a list of things.
    opening: list[Turn] = []
    if scene.photo.captions:
        opening.append((random_.choice(CAPTION), random_.choice(scene.photo.captions)))
    elif listed := list_turn(scene, random_):
        opening.append(listed)
    # 2. What may follow: names, numbers, what people asked, and whether things are there.
    later_turns = [*naming_turns(scene, random_), *count_turns(scene, seed)]
    for asked in scene.vqa:
        answers = agreed(asked["answers"])
        if answers and not any(map(tells_sides, (asked["question"], *asked["answers"]))):
            later_turns.append(answer_turn(asked["question"], answers[0][0], random_))
    turns = opening if random_.random() < 0.6 else []
    if not turns or scene.photo.captions:  # a list of what is there would tell whether a thing is
        later_turns += [phrase(q, random_, random_.random() < 0.3, CATEGORIES) for q in questions[:4]]
    random_.shuffle(later_turns)
    if random_.random() < 0.6:  # people rarely repeat LLaVA's words for short answers in one conversation
        later_turns = [turn for turn in later_turns if SINGLE_PHRASE not in turn[0]]
    # 3. Two or three of them, each answer with something that no answer before it says.
    length = random_.choice((2, 2, 3))
    answer_words = {word for _, answer in turns for word in content(answer)}
    for turn in later_turns:
        words = content(turn[1])
        if len(turns) < length and (words <= set(YES_NO) or not words <= answer_words):
            turns.append(turn)
            answer_words |= words
    return turns
