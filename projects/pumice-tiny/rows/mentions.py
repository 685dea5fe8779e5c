"""What the captions of a photo say is there, what is surely not, and what stays open."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from rows.nouns import DOING, NOUNS, ONE_PERSON, RIVALS, Noun

YES_CAPTIONS = 2  # so many captions must name a thing before "yes" is taught

# Phrases whose words do not name what they seem to; rewritten before words are read.
TRAPS = [
    (r"\bhot ?dogs?\b", "hotdog"),
    (r"\bice cream( cone)?s?\b", "icecream"),
    (r"\bdirt ?bik(e|er|es|ers|ing)\b", "motorbike dirtbike"),
    (r"\bmountain ?bik(e|er|es|ers|ing)\b", "mountainbike"),
    (r"\bbeach ?balls?\b", "beachball"),
    (r"\b(tennis|soccer) balls?\b", r"\1ball"),
    (r"\bsoccerball\b", "soccerball soccer"),
    (r"\b(ball|baseball) (cap|hat)s?\b", "baseballcap"),
    (
        r"\b(football|baseball|soccer|basketball|hockey|rugby|tennis) (player|team|game|match|uniform|helmet|"
        r"jersey|practice|coach|court|gear)(s?)\b",
        r"\1sport \2\3",
    ),
    (r"\bwater ?bottles?\b", "waterbottle"),
    (r"\bwater (gun|pistol|balloon|hose|slide|park|ski|skiing|skier)s?\b", r"\1 splash"),
    (r"\bfire (truck|engine)s?\b", "firetruck"),
    (r"\bfire (hydrant|fighter|man|men|place)s?\b", r"fire\1"),
    (r"\bstuffed (animal|dog|bear|toy|cat|rabbit|bunny|elephant|duck|monkey)s?\b", "stuffedtoy stuffed"),
    (r"\bteddy bears?\b", "teddy"),
    (
        r"\btoy (car|truck|train|boat|plane|airplane|horse|gun|dog|motorcycle|tractor|bus)s?\b",
        "toy vehicle stuffed",
    ),
    (r"\b(rocking|carousel|wooden|toy|hobby) horses?\b", "toy stuffed equestrian"),
    (r"\bswimming ?pools?\b", "swimmingpool swimming"),
    (r"\b(at|for|towards?|facing|to|into|from|away from|the|front of a|front of the) (the )?camera\b", " "),
    (r"\b(bath|bathing|swim|swimming) ?(suit|trunk|short)s?\b", "bathingsuit swim"),
    (r"\b(body|jump|snow|wet|diving|space|ski|track|sweat) ?suits?\b", "outfit clothing snow wet"),
    (r"\b(from|of|wine|beer|drinking|shot|water|champagne|their|two) glasses\b", "glass drink"),
    (r"\b(bus|train|subway) (stop|station|stand)s?\b", r"\2 traffic"),
    (r"\btrain tracks?\b", "railroad track station"),
    (r"\brail ?road tracks?\b", "railway track station"),
    (r"\bfootball fields?\b", "field footballsport"),
    (r"\brace ?tracks?\b", "racetrack"),
    (r"\bpark bench(es)?\b", "parkbench bench park"),
    (r"\bparking\b", "parkingplace street"),
    (r"\bcar park\b", "parkingplace street"),
    (r"\b(monkey|jungle) (bars?|gym)\b", "monkeybars"),
    (r"\bhula hoops?\b", "hulahoop"),
    (r"\blife ?(jacket|vest)s?\b", "vest outfit"),
    (r"\bwind ?surf(er|ing|s|ers)?\b", "windsurfer sail"),
    (r"\bpara ?sail(ing|er|s)?\b", "parasail"),
    (r"\b(brown|sand|tan|light|dark) ?(haired|hair)\b", r"\1 hair"),
    (r"\bt ?-? ?shirts?\b", "tshirt shirt"),
    # verbs that look like things
    (r"\bswings? (?=(a|an|the|his|her|at|with|of|their|from|in|through|over|around|back)\b)", "swinging "),
    (r"\b(golf|batting|baseball|tennis|bat|takes a|taking a|take a) swings?\b", r"\1 swinging"),
    (r"\b(man|woman|boy|girl|child|batter|player|person|he|she|kid|toddler|dog) swings\b", r"\1 swinging"),
    (r"\bslides? (?=(down|on|into|across|through|along|off|in|over|to|towards?|under|head)\b)", "sliding "),
    (r"\b(?<!ocean )(?<!the )waves? (?=(at|to|his|her|a|an|their|hello|flags?|goodbye)\b)", "waving "),
    (
        r"\bpaddles? (?=(a|an|his|her|through|down|across|along|the|out|their|in|on|towards?|up)\b)",
        "paddling ",
    ),
    (
        r"(?<!the )(?<!some )(?<!of )(?<!on )(?<!down )(?<!up )\bsteps (?=(over|onto|into|off|through)\b)",
        "stepping ",
    ),
    (r"\btrains (?=(a|the|his|her|for|with)\b)", "training "),
    (
        r"\b(?<!fallen )(?<!the )(?<!autumn )leaves (?=(a|an|the|his|her|for|from|behind|footprints)\b)",
        "leaving ",
    ),
    (r"\bbuilding (?=(a|an|the|sand\w*|snow\w*|some|something|castles?)\b)", "constructing "),
    (r"\bsticks? (?=(his|her|its|out|their|up)\b)", "sticking "),
    (r"\bfish(es)? (?=(in|from|at|off|on|with|out)\b)", "fishing "),
    (r"\bducks (?=(under|down|his|her|as|to)\b)", "ducking "),
    (r"\bsnow cones?\b", "icecream"),
    (r"\bshoot(s|ing)? (the )?pool\b|\bplay(s|ing)? pool\b|\bpool table\b", "billiards"),
    (r"\btie[sd]? ?-?dyed?\b", "tiedye"),
    (r"\b(rock|punk) (band|star|concert|music|musician|singer|group)s?\b", r"\2"),
    (r"\brocking chairs?\b", "rocker chair"),
    (r"\bwheel ?chairs?\b", "wheelchair"),
    (r"\blawn ?chairs?\b", "lawnchair chair"),
    (r"\bchair ?lifts?\b", "skilift"),
    (r"\bsnow (suit|boots?|gear|pants|jacket)\b", r"snow \1"),
    (r"\bsun ?(glasses)\b", "sunglasses"),
    (r"\bping ?-?pong\b", "pingpong"),
    (r"\bpool noodles?\b", "pool"),
    (r"\b(playing|play|plays) catch\b", "game"),
    (r"\bgerman shepherds?\b", "dog"),
    (r"\bgreat danes?\b", "dog"),
    (r"\bborder collies?\b", "dog"),
    (r"\bplays? dead\b", " "),
    (r"\bcats? ?-? ?walk\b", "stage"),
    (r"\bcow ?(boy|girl)s?\b", r"cowboy person"),
    (r"\bfish ?nets?\b", "stockings"),
    (r"\blady ?bugs?\b", "insect"),
    (r"\bnorth ?face\b|\bred bull\b|\bsanta clause?\b", "santa"),
    (r"\b(rock|ice|wall|mountain) ?-?climb(er|ing|s|ers)?\b", r"\1 climb\2"),
    (r"\b(man|men|woman|women|boys?|girls?|child|children|kids?|people|person)'s\b", r"\1"),
    (r"\b(no|without( an?| any| the| their| his| her)?|not wearing( an?)?) (\w+)\b", " "),
    (
        r"\b(picture|drawing|painting|photo|photograph|image|poster|statue|sculpture|mural) of "
        r"(a |an |the |some )?((\w+ ){0,2})\w+\b",
        r"\1",
    ),
]
_COMPILED = [(re.compile(pattern), replacement) for pattern, replacement in TRAPS]
_MOTOR = re.compile(r"\b(motorcycl\w*|motorbik\w*|motocross|dirtbike|moped)\b")
_BIKE = re.compile(r"\bbik(e|es|er|ers|ing)\b")


@lru_cache(maxsize=100_000)
def plain_words(caption: str) -> str:
    """The caption in lower case, misleading phrases rewritten, punctuation gone."""
    text = caption.lower()
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    return " ".join(re.findall(r"[a-z]+", text.replace("'s", "")))


def caption_words(captions: tuple[str, ...]) -> list[set[str]]:
    """Per caption: its words and its pairs of neighbouring words."""
    texts = [plain_words(caption) for caption in captions]
    if any(_MOTOR.search(text) for text in texts):
        texts = [_BIKE.sub("motorbike", text) for text in texts]
    nouns = []
    for text in texts:
        words = text.split()
        nouns.append(set(words) | {" ".join(pair) for pair in itertools.pairwise(words)})
    return nouns


@dataclass(frozen=True)
class Mentions:
    """Names of nouns (and of activities): surely there, and surely not there."""

    yes: dict[str, int]  # name -> captions that say so
    no: frozenset[str]
    doing_yes: dict[str, int]
    doing_no: frozenset[str]


@lru_cache(maxsize=20_000)
def mentions(captions: tuple[str, ...]) -> Mentions:
    """Judge every noun of the table against the captions of one photo."""
    per_caption = caption_words(captions)
    union = set().union(*per_caption)
    counts: Counter[str] = Counter(word for words in per_caption for word in words)
    yes = {}
    no = set()
    for noun in NOUNS.values():
        caption_count = sum(not noun.means.isdisjoint(words) for words in per_caption)
        if caption_count >= YES_CAPTIONS:
            yes[noun.name] = caption_count
        elif caption_count == 0 and noun.maybe.isdisjoint(union) and not _hidden(noun, union, counts):
            no.add(noun.name)
    doing_yes = {}
    doing_no = set()
    for name, (means, maybe) in DOING.items():
        caption_count = sum(not means.isdisjoint(words) for words in per_caption)
        if caption_count >= YES_CAPTIONS:
            doing_yes[name] = caption_count
        elif caption_count == 0 and maybe.isdisjoint(union):
            doing_no.add(name)
    return Mentions(yes, frozenset(no), doing_yes, frozenset(doing_no))


def _hidden(noun: Noun, union: set[str], counts: Counter[str]) -> bool:
    """Whether "a person" in some caption may be this noun: not when a rival is named twice."""
    if noun.name not in RIVALS or ONE_PERSON.isdisjoint(union):
        return False
    return max((counts[word] for word in RIVALS[noun.name]), default=0) < YES_CAPTIONS
