"""What somebody rides or holds, what is behind them, which sport it is: things that two captions name."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

from rows.base import SINGLE_PHRASE, Photo, Row, capital, casual, rng, row, table, with_article
from rows.grammar import FUNCTION_WORDS, read_clause
from rows.happening import IMAGES, Turn, is_alone
from rows.mentions import YES_CAPTIONS, caption_words, mentions
from rows.words import ACTING, COLOURS, MASS, PLACED, PROGRESSIVE, VAGUE, alternatives

KEPT = 2  # questions of one photo, beside that on its sport
SHORT = 0.35  # share of questions that ask for a single word or phrase
SENTENCES = 0.6  # share of the other answers that repeat who does what
ASKED = {
    "acting": ("What {be} the {who} {verb}?", "What {be} the {who} {verb} in this {img}?"),
    "beside": ("What is {verb} the {who}?", "What is {verb} the {who} in the {img}?"),
    "background": ("What is in the background?", "What is in the background of the {img}?"),
}
SPORT = ("What sport is this?", "What sport is shown in this {img}?", "Which sport can be seen here?")
BALL_SPORT = ("What sport is being played?", "What game are they playing?", "What sport are they playing?")
SPORTS = {
    kind: {name.strip(): frozenset(words.split()) for name, words in (line.split("|") for line in lines)}
    for kind, lines in table("sports").items()
}
_OPPOSITE = {"in front of": "behind", "next to": "next to", "beside": "next to"}  # as said -> as asked
_STANDS = ("standing", "posing", "walking", "running")  # one who sits in front of a thing may face it
_STOP = rf"(?:{alternatives([*FUNCTION_WORDS, *VAGUE, 'outside', 'toward', 'towards'])})\b"
_THING = (
    r"(?P<article>(?:(?:a|an|the|some|his|her|its|their) )?)"
    rf"(?P<adjectives>(?:(?!{_STOP})[a-z]+ ){{0,2}}?)"
    rf"(?P<noun>(?!{_STOP}|(?:{alternatives(COLOURS)})\b)[a-z]+)"
    rf"(?= (?!of\b){_STOP}|[,.]|$)"
)
_ACTING = re.compile(
    rf"^(?P<verb>{alternatives(ACTING)}|playing with|looking at|swimming in"
    rf"|(?:{alternatives(PLACED)}) (?:on|in|over|through|down|against|into|under)) {_THING}"
)
_BESIDE = re.compile(rf"\b(?P<verb>{alternatives(list(_OPPOSITE))}) {_THING}")
_BACKGROUND = re.compile(rf"\b(?:with|and) {_THING}(?= in the background)")


def _thing(found: re.Match[str], words: Sequence[set[str]]) -> tuple[str, str] | None:
    """What was found, without and with its article, if two captions name it; None if they do not."""

    def named(thing: str) -> bool:
        return sum(thing in caption for caption in words) >= YES_CAPTIONS

    noun, article = found["noun"], found["article"].strip()
    adjective = found["adjectives"].split()[-1:]
    if any(word in PROGRESSIVE or word.endswith("ing") for word in (*adjective, noun)) or not named(noun):
        return None
    if noun in MASS and article != "the":
        article = ""
    elif not article and not noun.endswith("s"):
        return None
    pair = " ".join([*adjective, noun])
    thing = pair if named(pair) else noun
    return thing, with_article(thing) if article in ("a", "an") else f"{article} {thing}".strip()


def _questions(photo: Photo) -> Iterator[tuple[re.Match[str], str, dict[str, str]]]:
    """(the thing found in a caption, the key in ASKED, the fields of its questions)."""
    for caption in photo.captions:
        clause = read_clause(caption)
        if clause and is_alone(clause.head, photo):
            fields = {"who": clause.head, "be": clause.be}
            if match := _ACTING.match(clause.action):
                yield match, "acting", fields | {"verb": match["verb"]}
            elif clause.action.startswith(_STANDS) and (match := _BESIDE.search(clause.action)):
                yield match, "beside", fields | {"verb": _OPPOSITE[match["verb"]]}
        if match := _BACKGROUND.search(caption.lower()):
            yield match, "background", {"verb": "background"}


def object_turns(photo: Photo, random_: random.Random) -> list[Turn]:
    """Up to KEPT questions, each on another verb or place, in random order."""
    words = caption_words(photo.captions)
    turns: dict[str, Turn] = {}
    for found, kind, fields in _questions(photo):
        thing = _thing(found, words)
        if thing is None or fields["verb"] in turns:
            continue
        question = random_.choice(ASKED[kind]).format(img=random_.choice(IMAGES), **fields)
        if random_.random() < SHORT:
            turns[fields["verb"]] = question + SINGLE_PHRASE, capital(thing[0])
        elif kind == "acting" and random_.random() < SENTENCES:
            sentence = "The {who} {be} {verb} ".format(**fields) + thing[1]
            turns[fields["verb"]] = casual(question, random_), f"{sentence}."
        else:
            turns[fields["verb"]] = casual(question, random_), f"{capital(thing[1])}."
    return random_.sample(list(turns.values()), min(KEPT, len(turns)))


def sport_turn(photo: Photo, random_: random.Random) -> Turn | None:
    """Which sport two captions name, where none names another. A dog with a football plays none."""
    words = caption_words(photo.captions)
    counts = {
        (kind, name): sum(not means.isdisjoint(caption) for caption in words)
        for kind, sports in SPORTS.items()
        for name, means in sports.items()
    }
    named = [sport for sport, count in counts.items() if count]
    no_dog = "dog" in mentions(photo.captions).no
    if len(named) != 1 or counts[named[0]] < YES_CAPTIONS or not no_dog:
        return None
    kind, name = named[0]
    question = random_.choice(SPORT + (BALL_SPORT if kind == "ball" else ())).format(
        img=random_.choice(IMAGES)
    )
    if random_.random() < SHORT:
        return question + SINGLE_PHRASE, capital(name)
    sentence = random_.choice(("", "It is ", "They are playing " if question in BALL_SPORT else "This is "))
    return casual(question, random_), f"{capital(sentence + name)}."


def object_rows(photos: Sequence[Photo], seed: int) -> list[Row]:
    rows = []
    for photo in photos:
        random_ = rng(seed, "objects", photo.name)
        turns = [*object_turns(photo, random_), sport_turn(photo, random_)]
        rows += [
            row(f"objects-{photo.name}-{n}", photo.image, [turn]) for n, turn in enumerate(turns) if turn
        ]
    return rows
