"""The nouns and activities that presence questions ask about, read from tables/."""

from __future__ import annotations

from dataclasses import dataclass

from rows.base import plural, table

GROUPS = {name.strip(): words.split() for name, words in (line.split("|") for line in table("groups")[""])}


@dataclass(frozen=True)
class Noun:
    """A thing to ask about. forms: (singular, plural) as asked, "" where there is none."""

    name: str
    kind: str
    forms: tuple[tuple[str, str], ...]
    means: frozenset[str]
    maybe: frozenset[str]


def _words(text: str) -> set[str]:
    words: set[str] = set()
    for word in text.split():
        if word.startswith("$"):
            words |= _words(" ".join(GROUPS[word[1:]]))
        elif word != "-":
            words |= {word, plural(word)}
    return words


def _read_nouns() -> dict[str, Noun]:
    nouns: dict[str, Noun] = {}
    for kind, lines in table("nouns").items():
        for line in lines:
            asked, means, maybe = (part.strip() for part in line.split("|"))
            forms = []
            for form in asked.split(";"):
                singular, plural_form = (side.strip() for side in form.split("/"))
                forms.append(("" if singular == "-" else singular, "" if plural_form == "-" else plural_form))
            name = forms[0][0] or forms[0][1]
            evidence = _words(means) | {side for form in forms for side in form if side}
            nouns[name] = Noun(
                name, kind, tuple(forms), frozenset(evidence), frozenset(_words(maybe) - evidence)
            )
    return nouns


def _read_activities() -> dict[str, tuple[frozenset[str], frozenset[str]]]:
    activities = {}
    for line in table("activities")[""]:
        name, means, maybe = (part.strip() for part in line.split("|"))
        activities[name] = (frozenset(means.split()), frozenset(maybe.split()) - frozenset(means.split()))
    return activities


NOUNS = _read_nouns()
DOING = _read_activities()  # name -> (words that mean it, words that may hide it)
# A caption that says "a person" of the one man in a photo leaves no room for a woman: such words
# hide a sex or an age only when no rival is named.
ONE_PERSON = frozenset(_words("$ONE")) - frozenset(GROUPS["MANY"])
RIVALS = {
    "man": frozenset(_words("$FEMALE $GIRL")),
    "woman": frozenset(_words("$MALE $BOY")),
    "boy": frozenset(_words("$MALE $FEMALE $GIRL")),
    "girl": frozenset(_words("$MALE $FEMALE $BOY")),
    "child": frozenset(_words("$MALE $FEMALE")),
    "baby": frozenset(_words("$MALE $FEMALE")),
}
