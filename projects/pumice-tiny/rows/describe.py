"""Longer descriptions: the fullest caption, then what the other captions add, as sentences."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from rows import prompts
from rows.attributes import colours
from rows.base import Photo, Row, capital, casual, rng, row, with_article
from rows.grammar import may_be_same, read_clause
from rows.happening import place_of, subject_of, wearing_of
from rows.mentions import caption_words, mentions
from rows.nouns import NOUNS
from rows.words import COUNTED, ONE_SUBJECTS, PLURAL_ONLY

LONGEST = 4  # sentences
LONG_CAPTION = 18  # words; such a caption is a description by itself
_BACKGROUND = re.compile(
    r"\b(?:with|and) ((?:a |an |the |some |two |three )?(?:[a-z]+ ){0,3}[a-z]+) in the background"
)
_WEAK = frozenset(
    [
        "jump",
        "jumps",
        "jumping",
        "play",
        "plays",
        "playing",
        "outside",
        "outdoors",
        "path",
        "track",
        "dog",
        "dogs",
        "leaps",
    ]
)
_UNFIT = ("animal", "toy", "instrument", "sky", "swing", "slide", "fish", "camera", "steps", "ball", "food")


def describe_rows(photos: Sequence[Photo], seed: int) -> list[Row]:
    """One row for every photo whose captions complement each other."""
    rows = []
    for photo in photos:
        random_ = rng(seed, "describe", photo.name)
        text = description(photo, random_)
        if text is not None:
            prompt = casual(random_.choice(prompts.DETAIL), random_)
            rows.append(row(f"describe-{photo.name}", photo.image, [(prompt, text)]))
    return rows


def description(photo: Photo, random_: random.Random) -> str | None:
    """One long caption or two to four sentences, without repetition; None when there is too little."""
    firsts = [c for c in photo.captions if 8 <= len(c.split()) <= 24]
    if not firsts:
        return None
    drafts = [_draft(photo, first, random_) for first in firsts]
    best = max(drafts, key=lambda sentences: (len(sentences), sum(map(len, sentences)), sentences))
    if len(best) > 1:
        return " ".join(best)
    longest = max(firsts, key=len)
    return longest if len(longest.split()) >= LONG_CAPTION else None


def _draft(photo: Photo, first: str, random_: random.Random) -> list[str]:
    sentences = [first]
    for sentence in _facts(photo, first, random_):
        if len(sentences) < LONGEST and _adds(sentence, sentences):
            sentences.append(sentence)
    return sentences


def _things(text: str) -> set[str]:
    """Names of the table's nouns that a text mentions."""
    words = caption_words((text,))[0]
    return {name for name, noun in NOUNS.items() if not noun.means.isdisjoint(words)}


def _adds(sentence: str, before: Sequence[str]) -> bool:
    earlier_words = {word for text in before for word in re.findall(r"[a-z]+", text.lower())}
    new = [word for word in re.findall(r"[a-z]{3,}", sentence.lower()) if word not in earlier_words]
    return (
        len(
            set(new) - {"the", "there", "also", "wearing", "she", "they", "some", "background", "can", "seen"}
        )
        >= 1
    )


def _facts(photo: Photo, first: str, random_: random.Random) -> list[str]:
    """Further sentences, each true by the captions and about what `first` leaves unsaid."""
    facts = []
    mentioned = _things(first)
    agreed = mentions(photo.captions).yes
    subject = subject_of(photo)
    clause = read_clause(first)
    if subject is not None and clause is not None and may_be_same(clause.head, subject[0]):
        who, plural = clause.head, clause.plural
        pronoun = "they" if plural else ONE_SUBJECTS[who]
        name = capital(pronoun) if pronoun else f"The {who}"
        be = "are" if plural else "is"
        worn = wearing_of(photo, who)
        if worn and not set(worn.split()[-1:]) & set(re.findall(r"[a-z-]+", first.lower())):
            facts.append(f"{name} {be} wearing {worn}.")
        for caption in photo.captions:
            other = read_clause(caption)
            if other is None or other.plural != plural or not may_be_same(other.head, who):
                continue
            new = (_things(other.action) - mentioned - {"person", "animal"}) & agreed.keys()
            if new and other.action.split()[0] not in clause.action and len(other.action.split()) <= 9:
                facts.append(f"{name} {be} {other.action}.")
                mentioned |= _things(other.action)
                break
        place = place_of(photo)
        if place is not None and not (_things(place) & mentioned) and _things(place):
            facts.append(f"The {who} {be} {place}.")
            mentioned |= _things(place)
    for thing, colour in colours(photo).items():
        if thing in first.lower() and not re.search(rf"\b{colour.split()[0]}\b", first.lower()):
            facts.append(f"The {thing} {'are' if thing in PLURAL_ONLY else 'is'} {colour}.")
    for caption in photo.captions:
        background = _BACKGROUND.search(caption.lower())
        if background and not (_things(background[1]) & mentioned) and _things(background[1]):
            is_plural = background[1].endswith("s") or background[1] in COUNTED
            facts.append(f"There {'are' if is_plural else 'is'} {background[1]} in the background.")
            mentioned |= _things(background[1])
            break
    facts += _also(photo, first, mentioned, random_)
    return facts


def _also(photo: Photo, first: str, mentioned: set[str], random_: random.Random) -> list[str]:
    """`There is also a fence in the picture.`: what captions name and no sentence has."""
    named = mentions(photo.captions).yes
    words = caption_words((first,))[0]
    unnamed = []
    for name in sorted(named, key=lambda name: (-named[name], name)):
        noun = NOUNS[name]
        if name in mentioned or name in _UNFIT or noun.kind in ("people", "clothing"):
            continue
        if noun.maybe.isdisjoint(words - _WEAK) and noun.forms[0][0]:
            unnamed.append(noun)
    if not unnamed:
        return []
    phrases = [with_article(n.forms[0][0]) if n.forms[0][1] else n.forms[0][0] for n in unnamed[:2]]
    if len(unnamed) > 1 and not unnamed[0].maybe.isdisjoint(unnamed[1].means):
        phrases = phrases[:1]  # a beach and a shore are one place
    things = " and ".join(phrases)
    img = random_.choice(("picture", "photo", "image", "scene"))
    if random_.random() < 0.5:
        return [f"There is also {things} in the {img}."]
    return [f"{capital(things)} can also be seen in the {img}."]
