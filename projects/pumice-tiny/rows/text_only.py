"""Rows without a picture, which keep the language model able to talk, count and define."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

from rows.base import SINGLE_PHRASE, Row, capital, casual, rng, row, table, with_article

Turn = tuple[str, str]
Maker = Callable[[random.Random], list[Turn]]


def _pairs(line: str) -> tuple[str, str]:
    key, value = line.split("|", 1)
    return key.strip(), value.strip()


FACTS = {section: [_pairs(line) for line in lines] for section, lines in table("facts").items()}


def _capital_city(random_: random.Random) -> list[Turn]:
    country, city = random_.choice(FACTS["capitals"])
    roll = random_.random()
    if roll < 0.35:
        return [(f"What is the capital of {country}?" + SINGLE_PHRASE, city)]
    if roll < 0.5:
        return [(f"Which country has {city} as its capital?", f"{city} is the capital of {country}.")]
    question = random_.choice(
        (
            f"What is the capital of {country}?",
            f"What is {country}'s capital city?",
            f"Name the capital of {country}.",
        )
    )
    return [(casual(question, random_), f"The capital of {country} is {city}.")]


def _arithmetic(random_: random.Random) -> list[Turn]:
    kind = random_.choice("+-*/")
    a, b = random_.randint(2, 12), random_.randint(2, 12)
    if kind == "+":
        a, b = random_.randint(1, 60), random_.randint(1, 40)
        words, result = f"{a} plus {b}", a + b
    elif kind == "-":
        a, b = sorted((random_.randint(1, 60), random_.randint(1, 60)), reverse=True)
        words, result = f"{a} minus {b}", a - b
    elif kind == "*":
        words, result = f"{a} times {b}", a * b
    else:
        words, result, a = f"{a * b} divided by {b}", a, a * b
    question = random_.choice(
        (f"What is {words}?", f"What is {a} {kind} {b}?", f"Calculate {words}.", f"How much is {words}?")
    )
    if random_.random() < 0.4 and question.endswith("?"):
        return [(question + SINGLE_PHRASE, str(result))]
    return [(casual(question, random_), f"{capital(words)} is {result}.")]


def _definition(random_: random.Random) -> list[Turn]:
    thing, text = random_.choice(FACTS["definitions"])
    name = with_article(thing) if not thing.startswith("=") else thing[1:]
    bare = thing.removeprefix("=")
    question = random_.choice(
        (
            f"What is {name}?",
            f'What does the word "{bare}" mean?',
            f'Define "{bare}".',
            f"Explain what {name} is.",
        )
    )
    return [(casual(question, random_), f"{capital(name)} is {text}")]


def _table(section: str, forms: tuple[tuple[str, str], ...]) -> Maker:
    """Rows from one section of the facts; forms are (question, answer) with {key} and {value}."""
    entries = FACTS[section]

    def make(random_: random.Random) -> list[Turn]:
        key, value = random_.choice(entries)
        question, answer = random_.choice(forms)
        words = {"key": key, "value": value}
        return [(casual(question.format(**words), random_), capital(answer.format(**words)))]

    return make


def _list(random_: random.Random) -> list[Turn]:
    sort, members = random_.choice(FACTS["lists"])
    number, word = random_.choice(((3, "three"), (4, "four"), (5, "five")))
    chosen = random_.sample([m.strip() for m in members.split(",")], number)
    question = random_.choice(
        (
            f"Name {word} {sort}.",
            f"List {word} {sort}.",
            f"Give me {word} examples of {sort}.",
            f"Can you name {word} {sort}?",
        )
    )
    if random_.random() < 0.4:
        return [(question, "\n".join(f"{n}. {capital(m)}" for n, m in enumerate(chosen, start=1)))]
    joined = ", ".join(chosen[:-1]) + " and " + chosen[-1]
    return [(question, f"{capital(joined)}.")]


def _chat(random_: random.Random) -> list[Turn]:
    """A greeting, perhaps with a second turn."""
    turns = [random_.choice(FACTS["greetings"])]
    if random_.random() < 0.4:
        turns += random_.choice((_capital_city, _arithmetic, _definition))(random_)
    return turns


def _two(random_: random.Random) -> list[Turn]:
    """Two small questions in one conversation."""
    return [*_arithmetic(random_), *random_.choice((_capital_city, _definition, _list))(random_)]


def _rewrite(random_: random.Random) -> list[Turn]:
    past, present = random_.choice(FACTS["tenses"])
    roll = random_.random()
    if roll < 0.4:
        return [(f"Rewrite this sentence in the past tense: {present}", past)]
    if roll < 0.8:
        return [(f"Rewrite this sentence in the present tense: {past}", present)]
    return [(f"Write this in capital letters: {present}", present.upper())]


def _compare(random_: random.Random) -> list[Turn]:
    a, b = random_.sample(range(2, 100), 2)
    if random_.random() < 0.5:
        return [(f"Which number is larger, {a} or {b}?", f"{max(a, b)} is larger than {min(a, b)}.")]
    numbers = random_.sample(range(1, 60), 4)
    listed = ", ".join(map(str, numbers))
    return [(f"Sort these numbers from smallest to largest: {listed}", ", ".join(map(str, sorted(numbers))))]


def _no_picture(random_: random.Random) -> list[Turn]:
    """A question about a picture that was not given."""
    question = random_.choice(
        (
            "What is in the image?",
            "Describe the picture.",
            "What color is the car in the photo?",
            "What do you see in this picture?",
            "Is there a dog in the image?",
            "Can you describe this photo?",
        )
    )
    answer = random_.choice(
        (
            "I do not see a picture here. Please send me one and I will describe it.",
            "There is no image in our conversation yet. Please share one with me.",
            "I cannot see any picture. Could you send it, please?",
        )
    )
    return [(question, answer)]


MAKERS: tuple[tuple[Maker, float], ...] = (
    (_capital_city, 1.2),
    (_arithmetic, 1.6),
    (_definition, 1.8),
    (_list, 1.2),
    (_chat, 1.0),
    (_two, 0.6),
    (_rewrite, 0.7),
    (_compare, 0.5),
    (_no_picture, 0.25),
    (
        _table(
            "opposites",
            (
                ('What is the opposite of "{key}"?', 'The opposite of "{key}" is "{value}".'),
                ("What is the antonym of {key}?", "The antonym of {key} is {value}."),
                ("Give me the opposite of {value}.", "{key}."),
            ),
        ),
        0.7,
    ),
    (_table("questions", (("{key}", "{value}"),)), 2.4),
    (
        _table(
            "how_to",
            (
                ("How do I {key}?", "{value}"),
                ("How can I {key}?", "{value}"),
                ("Tell me how to {key}.", "{value}"),
                ("Explain how to {key}.", "{value}"),
            ),
        ),
        1.2,
    ),
    (
        _table(
            "plurals",
            (
                ('What is the plural of "{key}"?', 'The plural of "{key}" is "{value}".'),
                ("What is the singular of {value}?", "The singular of {value} is {key}."),
            ),
        ),
        0.4,
    ),
    (_table("young", (("What is a baby {key} called?", "A baby {key} is called a {value}."),)), 0.3),
    (_table("sounds", (("What sound does a {key} make?", "A {key} {value}."),)), 0.25),
)


def _question(text: str) -> str:
    """A question without what may differ between two forms of the same one."""
    return text.replace(SINGLE_PHRASE, "").lower().rstrip("?.")


def text_rows(seed: int, part: str, number: int, learned: Iterable[Row] = ()) -> list[Row]:
    """Different rows; the same question never comes twice, and none of the rows `learned` comes at all."""
    random_ = rng(seed, "text", part)
    makers = [maker for maker, _ in MAKERS]
    weights = [weight for _, weight in MAKERS]
    rows: list[Row] = []
    questions: set[str] = set()
    known = {_question(turn["value"]) for entry in learned for turn in entry["conversations"][::2]}
    for _ in range(number * 40):
        if len(rows) == number:
            break
        turns = random_.choices(makers, weights)[0](random_)
        key = turns[0][0].lower().rstrip("?.") + (turns[1][0].lower() if len(turns) > 1 else "")
        if key not in questions and not any(_question(question) in known for question, _ in turns):
            questions.add(key)
            rows.append(row(f"text-{part}-{len(rows)}", None, turns))
    return rows
