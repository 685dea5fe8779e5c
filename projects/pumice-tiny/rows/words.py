"""Tables of words that the caption patterns read: subjects, verbs, colours, numbers, clothes, places."""

from __future__ import annotations

import re

from rows.base import table

_LISTS = {name: " ".join(lines).split() for name, lines in table("words").items()}

# head of a subject -> (what to call it in a question, pronoun)
ONE_SUBJECTS = {
    "man": "he",
    "guy": "he",
    "boy": "he",
    "gentleman": "he",
    "father": "he",
    "woman": "she",
    "lady": "she",
    "girl": "she",
    "mother": "she",
    "dog": "it",
    "puppy": "it",
    "cat": "it",
    "horse": "it",
    "bird": "it",
    "duck": "it",
    "cow": "it",
    "child": "",
    "kid": "",
    "toddler": "",
    "baby": "",
    "person": "",
    "skateboarder": "",
    "snowboarder": "",
    "surfer": "",
    "skier": "",
    "climber": "",
    "biker": "",
    "cyclist": "",
    "player": "",
    "rider": "",
    "hiker": "",
    "swimmer": "",
    "bicyclist": "",
    "motorcyclist": "",
    "dancer": "",
    "musician": "",
}
MANY_SUBJECTS = (
    "men",
    "women",
    "boys",
    "girls",
    "dogs",
    "puppies",
    "people",
    "children",
    "kids",
    "players",
    "horses",
    "guys",
    "ladies",
    "toddlers",
    "bikers",
    "cyclists",
    "hikers",
    "skiers",
    "surfers",
    "climbers",
    "birds",
    "teenagers",
    "adults",
)
SAME_SUBJECT = (  # different words for what may be one subject
    {"man", "guy", "gentleman", "father", "person"},
    {"boy", "child", "kid", "toddler", "baby", "person"},
    {"girl", "child", "kid", "toddler", "baby", "person"},
    {"woman", "lady", "mother", "person"},
    {
        "man",
        "boy",
        "person",
        "skateboarder",
        "snowboarder",
        "surfer",
        "skier",
        "climber",
        "biker",
        "cyclist",
        "player",
        "rider",
        "hiker",
        "swimmer",
        "bicyclist",
        "motorcyclist",
        "dancer",
        "musician",
    },
    {"dog", "puppy"},
    {"men", "people", "guys", "players", "hikers", "climbers", "adults"},
    {"women", "people", "ladies", "adults"},
    {"children", "kids", "boys", "people", "toddlers"},
    {"children", "kids", "girls", "people", "toddlers"},
    {"dogs", "puppies"},
)
PLAIN_VERBS = _LISTS["plain verbs"]
E_VERBS = _LISTS["verbs with e"]
DOUBLE_VERBS = _LISTS["doubling verbs"]
IRREGULAR_VERBS = {
    "lays": "lying",
    "lies": "lying",
    "laying": "lying",
    "skis": "skiing",
    "flies": "flying",
    "carries": "carrying",
    "tries": "trying",
    "does": "doing",
    "goes": "going",
    "crosses": "crossing",
    "swings": "swinging",
    "sits": "sitting",
    "skates": "skating",
    "bikes": "biking",
    "trots": "trotting",
    "bats": "batting",
}


def _third_person() -> dict[str, str]:
    table = {}
    for verb in PLAIN_VERBS:
        ending = "es" if verb.endswith(("s", "x", "ch", "sh", "ss")) else "s"
        table[verb + ending] = verb + "ing"
    for verb in E_VERBS:
        table[verb + "s"] = verb.removesuffix("e") + "ing"
    for verb in DOUBLE_VERBS:
        table[verb + "s"] = verb + verb[-1] + "ing"
    table["pets"] = "petting"
    return table | IRREGULAR_VERBS


PROGRESSIVE = _third_person()  # "runs" -> "running"
FUNCTION_WORDS = _LISTS["function words"]
NOT_ACTIONS = frozenset(_LISTS["not actions"])

COLOURS = (
    "black",
    "white",
    "red",
    "blue",
    "green",
    "yellow",
    "brown",
    "orange",
    "pink",
    "purple",
    "gray",
    "grey",
    "tan",
    "gold",
    "silver",
    "beige",
)
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
COUNTED = {  # plural as captions say it -> (singular, plural) as asked
    "dogs": ("dog", "dogs"),
    "puppies": ("dog", "dogs"),
    "men": ("man", "men"),
    "guys": ("man", "men"),
    "women": ("woman", "women"),
    "ladies": ("woman", "women"),
    "boys": ("boy", "boys"),
    "girls": ("girl", "girls"),
    "people": ("person", "people"),
    "children": ("child", "children"),
    "kids": ("child", "children"),
    "horses": ("horse", "horses"),
    "birds": ("bird", "birds"),
    "cars": ("car", "cars"),
    "balls": ("ball", "balls"),
    "bikes": ("bike", "bikes"),
    "boats": ("boat", "boats"),
}
CLOTHES = _LISTS["clothes"]
COLOURED = _LISTS["coloured"]
PLURAL_ONLY = frozenset(
    {
        "shorts",
        "pants",
        "jeans",
        "sunglasses",
        "glasses",
        "goggles",
        "trunks",
        "boots",
        "shoes",
        "gloves",
        "overalls",
        "dogs",
        "horses",
        "cats",
    }
)
PLACES = _LISTS["places"]
ACTING = _LISTS["acting"]
PLACED = _LISTS["placed"]
VAGUE = _LISTS["vague"]
MASS = frozenset(_LISTS["mass"])
PLACE_PREPOSITIONS = {
    "in": "in",
    "on": "on",
    "at": "at",
    "near": "near",
    "beside": "beside",
    "by": "by",
    "through": "in",
    "inside": "inside",
    "next to": "next to",
    "in front of": "in front of",
    "in the middle of": "in the middle of",
    "on top of": "on top of",
    "outside": "outside",
    "under": "under",
    "behind": "behind",
}


def alternatives(words: str | list[str] | tuple[str, ...]) -> str:
    """A regular expression for any of the words, longest first."""
    listed = words.split() if isinstance(words, str) else list(words)
    return "|".join(re.escape(word) for word in sorted(set(listed), key=lambda w: (-len(w), w)))
