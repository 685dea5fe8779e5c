"""Yes/no questions on what a photo shows, balanced so that the question alone tells nothing.

Every noun is asked about as often with "yes" as with "no", as far as the captions allow; half of
the negatives are nouns that often accompany what the photo shows (POPE's adversarial setting,
arXiv 2305.10355), the others follow the nouns' popularity.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rows.base import SINGLE_PHRASE, Photo, Row, casual, rng, row, with_article
from rows.mentions import Mentions, caption_words, mentions
from rows.nouns import NOUNS, Noun

NOUN_LIMIT = 1500  # yes questions per noun at most
RARE = 150  # below so many photos a noun may also be taught by a single caption

# {a} "a dog", {n} "dog", {any} "dogs" or "snow", {is} "is" or "are"; {img} "image", "photo", ...
SINGULAR = (
    "Is there {a} in the {img}?",
    "Is there {a} in the {img}?",
    "Is there {a} in this {img}?",
    "Is there {a}?",
    "Can you see {a}?",
    "Can you see {a} in the {img}?",
    "Do you see {a} in this {img}?",
    "Does this {img} show {a}?",
    "Does the {img} contain {a}?",
    "Is {a} visible in the {img}?",
    "Is {a} present in this {img}?",
    "Is there at least one {n} in the {img}?",
    "Does {a} appear in the {img}?",
)
PLURAL = (
    "Are there any {any} in the {img}?",
    "Are there any {any} in the {img}?",
    "Are there {any} in this {img}?",
    "Are there any {any}?",
    "Can you see any {any}?",
    "Do you see any {any} in the {img}?",
    "Does this {img} show any {any}?",
    "Does the {img} contain {any}?",
    "Are any {any} visible in the {img}?",
)
MASS = (
    "Is there {any} in the {img}?",
    "Is there any {any} in the {img}?",
    "Is there any {any} in this {img}?",
    "Is there {any}?",
    "Can you see {any}?",
    "Can you see any {any} in the {img}?",
    "Do you see {any} in this {img}?",
    "Does this {img} show {any}?",
    "Does the {img} contain {any}?",
    "Is {any} visible in the {img}?",
    "Is any {any} present in this {img}?",
)
ACTIVITY = (
    "Is someone {v} in the {img}?",
    "Is anyone {v} in this {img}?",
    "Is anybody {v}?",
    "Does the {img} show someone {v}?",
    "Can you see someone {v}?",
)
ANIMALS_TOO = frozenset({"running", "jumping", "swimming", "sitting", "sleeping", "eating"})
IMAGES = ("image", "image", "image", "picture", "picture", "photo", "photograph")
SHORT_SUFFIXES = (
    SINGLE_PHRASE,
    SINGLE_PHRASE,
    SINGLE_PHRASE,
    " Answer yes or no.",
    " Answer yes or no.",
    "\nAnswer yes or no.",
    " Please answer yes or no.",
    " Answer with yes or no.",
    " Reply with yes or no only.",
    " Yes or no?",
    " Just say yes or no.",
    " Answer with a single word.",
)
SHORT_PREFIXES = ("Answer yes or no: ", "Yes or no: ", "Answer with yes or no: ")


Names = Callable[[Photo], Iterable[str]]  # of the nouns that a photo shows, or lacks


@dataclass(frozen=True)
class Question:
    """One question on one photo. kind: yes, hard (accompanies what is there), popular."""

    photo: Photo
    name: str
    answer: bool
    kind: str


def choose(photos: Sequence[Photo], seed: int, per_photo: int = 4, rare: int = RARE) -> list[Question]:
    """Balanced questions over all photos: at most per_photo yes and as many no for each."""
    return balance(photos, _positives(photos, seed, per_photo, rare), _present, _absent, seed, per_photo)


def balance(
    photos: Sequence[Photo],
    positives: Sequence[Question],
    present: Names,
    absent: Names,
    seed: int,
    per_photo: int,
) -> list[Question]:
    """Those questions and as many with "no" for every noun, as far as the photos surely lack it.

    present, absent: the nouns that a photo shows for sure, and those that it lacks for sure.
    """
    together = _cooccurrence(photos, present)
    needed = Counter(question.name for question in positives)
    slots = Counter(question.photo.name for question in positives)
    popular = Counter(needed)
    negatives: list[Question] = []
    order = list(photos)
    rng(seed, "presence", "order").shuffle(order)
    mean_slots = math.ceil(len(positives) / max(1, len(photos)))
    for photo in order:
        pick = rng(seed, "presence", "no", photo.name)
        asked: set[str] = set()
        for slot in range(max(mean_slots, min(slots[photo.name], per_photo))):
            absent_names = sorted(n for n in absent(photo) if needed[n] > 0 and n not in asked)
            if not absent_names:
                break
            hard = slot % 2 == 0
            near = [sum(together[seen][n] / popular[n] for seen in present(photo)) for n in absent_names]
            weights = [
                (c + 1e-3 if hard else 1.0) * needed[n] for c, n in zip(near, absent_names, strict=True)
            ]
            name = pick.choices(absent_names, weights)[0]
            asked.add(name)
            needed[name] -= 1
            negatives.append(Question(photo, name, False, "hard" if hard else "popular"))
    drawn = Counter(question.name for question in negatives)
    selected = []
    shuffled = list(positives)
    rng(seed, "presence", "balance").shuffle(shuffled)
    for question in shuffled:  # a noun without enough honest negatives gives up positives
        if drawn[question.name] > 0:
            drawn[question.name] -= 1
            selected.append(question)
    questions = selected + negatives
    rank = {photo.name: number for number, photo in enumerate(photos)}
    return sorted(questions, key=lambda q: (rank[q.photo.name], q.name))


def _present(photo: Photo) -> list[str]:
    judged = mentions(photo.captions)
    return [*judged.yes, *_acts(judged, judged.doing_yes)]


def _absent(photo: Photo) -> list[str]:
    judged = mentions(photo.captions)
    return [*judged.no, *_acts(judged, judged.doing_no)]


def _acts(judged: Mentions, names: Iterable[str]) -> list[str]:
    """Activities as names to ask: "doing reading", "dog running"; none where it is open who does it."""
    dogs_only = "person" in judged.no and "dog" in judged.yes
    acts = []
    for name in names:
        if name in ANIMALS_TOO and dogs_only:
            acts.append(f"dog {name}")
        elif name not in ANIMALS_TOO or "animal" in judged.no:
            acts.append(f"doing {name}")
    return acts


def _cooccurrence(photos: Sequence[Photo], present: Names) -> dict[str, Counter[str]]:
    together: dict[str, Counter[str]] = defaultdict(Counter)
    for photo in photos:
        names = present(photo)
        for name in names:
            together[name].update(names)
    return together


def _positives(photos: Sequence[Photo], seed: int, per_photo: int, rare: int) -> list[Question]:
    present = {photo.name: set(_present(photo)) for photo in photos}
    absent = Counter(name for photo in photos for name in _absent(photo))
    counts = Counter(name for names in present.values() for name in names)
    for photo in photos:
        words = caption_words(photo.captions)
        for noun in NOUNS.values():
            once = noun.kind not in ("people", "scenery", "places") and counts[noun.name] < rare
            if once and any(not noun.means.isdisjoint(w) for w in words):
                present[photo.name].add(noun.name)
    counts = Counter(name for names in present.values() for name in names)
    questions = []
    for photo in photos:
        pick = rng(seed, "presence", "yes", photo.name)
        names = []
        for name in sorted(present[photo.name]):
            limit = min(NOUN_LIMIT, absent[name])
            if pick.random() < limit / counts[name]:
                names.append(name)
        names.sort(key=lambda name: pick.random() ** math.sqrt(counts[name]), reverse=True)
        questions += [Question(photo, name, True, "yes") for name in names[:per_photo]]
    return questions


def forced(question: str, random_: random.Random) -> str:
    """The question with words that ask for a bare yes or no."""
    if random_.random() < 0.12:
        return random_.choice(SHORT_PREFIXES) + question[:1].lower() + question[1:]
    return question + random_.choice(SHORT_SUFFIXES)


def phrase(
    question: Question, random_: random.Random, short: bool, nouns: Mapping[str, Noun] = NOUNS
) -> tuple[str, str]:
    """(question, answer) as text; a short one asks for and gets exactly Yes or No."""
    img = random_.choice(IMAGES)
    if question.name not in nouns:
        text, full = _activity(question, img, random_)
    else:
        text, full = _thing(nouns[question.name], question.answer, img, random_)
    if short:
        return forced(text, random_), "Yes" if question.answer else "No"
    return casual(text, random_), full


def _thing(noun: Noun, answer: bool, img: str, random_: random.Random) -> tuple[str, str]:
    singular, plural = noun.forms[0] if random_.random() < 0.7 else random_.choice(noun.forms)
    scope = random_.choice(("", f" in the {img}", f" in the {img}", f" in this {img}"))
    if not plural:
        text = random_.choice(MASS).format(any=singular, img=img)
        return text, f"Yes, there is {singular}{scope}." if answer else f"No, there is no {singular}{scope}."
    alone = 0.95 if noun.kind in ("scenery", "places") or noun.name == "crowd" else 0.72
    if singular and (noun.name != "person" or random_.random() < 0.6) and random_.random() < alone:
        text = random_.choice(SINGULAR).format(a=with_article(singular), n=singular, img=img)
        if answer:
            return text, f"Yes, there is {with_article(singular)}{scope}."
        return text, f"No, there is no {singular}{scope}."
    text = random_.choice(PLURAL).format(any=plural, img=img)
    if answer and singular and noun.name != "person":
        return text, f"Yes, there is at least one {singular}{scope}."
    return text, f"Yes, there are {plural}{scope}." if answer else f"No, there are no {plural}{scope}."


def _activity(question: Question, img: str, random_: random.Random) -> tuple[str, str]:
    who, doing = question.name.split(" ", 1)
    if who == "dog":
        text = f"Is the dog {doing}{random_.choice(('', f' in the {img}', f' in this {img}'))}?"
        return text, f"Yes, the dog is {doing}." if question.answer else f"No, the dog is not {doing}."
    text = random_.choice(ACTIVITY).format(v=doing, img=img)
    return text, f"Yes, someone is {doing}." if question.answer else f"No, nobody is {doing}."


def presence_rows(questions: Sequence[Question], seed: int, nouns: Mapping[str, Noun] = NOUNS) -> list[Row]:
    """One row per question."""
    rows = []
    for number, question in enumerate(questions):
        random_ = rng(seed, "presence", "words", question.photo.name, question.name)
        turn = phrase(question, random_, random_.random() < 0.5, nouns)
        rows.append(row(f"presence-{number}", question.photo.image, [turn]))
    return rows


def presence_test(photos: Sequence[Photo], seed: int) -> list[Row]:
    """Held-out questions: {"id", "image", "question", "answer", "kind", "noun"}, half yes and half no.

    Things only, agreed by two captions; asked as POPE asks.
    """
    questions = [q for q in choose(photos, seed, per_photo=4, rare=0) if q.name in NOUNS]
    return as_test(questions, NOUNS, seed, "presence")


def as_test(questions: Sequence[Question], nouns: Mapping[str, Noun], seed: int, source: str) -> list[Row]:
    """As many of the questions with yes as with no, asked as POPE asks."""
    positive = [q for q in questions if q.answer]
    negative = [q for q in questions if not q.answer]
    size = min(len(positive), len(negative))
    random_ = rng(seed, source, "test")
    chosen = random_.sample(positive, size) + random_.sample(negative, size)
    chosen.sort(key=lambda q: (q.photo.name, q.name))
    return [
        {
            "id": f"{source}-val-{number}",
            "image": question.photo.image,
            "question": _plain_question(nouns[question.name]),
            "answer": "yes" if question.answer else "no",
            "kind": question.kind,
            "noun": question.name,
        }
        for number, question in enumerate(chosen)
    ]


def _plain_question(noun: Noun) -> str:
    singular, plural = noun.forms[0]
    if not singular:
        return f"Are there any {plural} in the image?"
    return f"Is there {with_article(singular) if plural else singular} in the image?"
