"""A kind of row: what the teacher is told and shown, how its reply is parsed, and what is checked."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pumice.storage.yaml_file import read_yaml
from pumice.synth.context import AnnotatedBox, Context
from pumice.synth.objects import Vocabulary


class Unparsed(Exception):
    """A reply that is not in the form that its kind asks for; the message says why."""


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Draft:
    """One reply after parsing, together with what is known about its picture."""

    kind: Kind
    context: Context
    turns: tuple[Turn, ...]
    vocabulary: Vocabulary
    known: frozenset[str]  # things that the annotations name


Check = Callable[[Draft], str | None]  # to what is wrong, or None


@dataclass(frozen=True)
class Example:
    """A worked example: what the teacher would be told, and the reply that we would like."""

    context: Context
    reply: str


@dataclass(frozen=True)
class Kind:
    """One kind of instruction data. turns and words are (least, most): of a row, and of an answer."""

    name: str
    system: str
    examples: tuple[Example, ...]
    parse: Callable[[str, random.Random], list[Turn]]  # raises Unparsed; the generator picks wordings
    boxes: bool = True  # whether the teacher is told boxes, or captions alone
    turns: tuple[int, int] = (1, 1)
    words: tuple[int, int] = (1, 400)
    max_tokens: int = 512  # of a reply
    unsupported: int = 1  # things named without support that a row may have
    presumes: bool = True  # whether the things that a question names must be there as well
    alike: bool = False  # whether rows of different pictures may say the same
    suffix: str = ""  # put behind the first question of a row, as LLaVA-1.5 puts its format prompts
    checks: tuple[Check, ...] = ()  # further ones of this kind

    def messages(self, context: Context, examples: int | None) -> list[tuple[str, str]]:
        """(role, text) of a request; the last one is about `context`. examples: how many, None for all."""
        messages = [("system", self.system)]
        for example in self.examples[:examples]:
            messages += [("user", example.context.described(boxes=self.boxes)), ("assistant", example.reply)]
        return [*messages, ("user", context.described(boxes=self.boxes))]


_LABEL = re.compile(
    r"^[\s>#*_\-]*(?:(question|q|user|human)|(answer|a|assistant|gpt))\s*(?:\d+\s*)?[:.)]+[*_]*[ \t]*",
    re.I | re.M,
)
_RULE = re.compile(r"^\s*[=\-*_]{3,}\s*$", re.M)


def pairs(reply: str, _: random.Random | None = None) -> list[Turn]:
    """`Question: ...` and `Answer: ...` in turn, each up to the next label. Raises Unparsed.

    Labels may be short (Q:, A:), numbered, or bold; rules of `===` or `---` between them are passed over.
    """
    text = _RULE.sub("", reply.replace("\r\n", "\n"))
    marks = list(_LABEL.finditer(text))
    if not marks:
        raise Unparsed("no line begins with 'Question:'")
    turns: list[Turn] = []
    asked = ""
    for number, mark in enumerate(marks):
        end = marks[number + 1].start() if number + 1 < len(marks) else len(text)
        body = text[mark.end() : end].strip().strip("*").strip()
        is_question = mark.group(1) is not None
        if is_question != (number % 2 == 0):
            found, due = ("a question", "an answer") if is_question else ("an answer", "a question")
            raise Unparsed(f"{found} stands where {due} should")
        if not body:
            raise Unparsed(
                f"the {'question' if is_question else 'answer'} of turn {number // 2 + 1} is empty"
            )
        if is_question:
            asked = body
        else:
            turns.append(Turn(asked, body))
    if len(marks) % 2:
        raise Unparsed("the last question has no answer")
    return turns


def whole(questions: Sequence[str]) -> Callable[[str, random.Random], list[Turn]]:
    """A parser for replies that are one answer; the question is drawn from `questions`."""

    def parse(reply: str, pick: random.Random) -> list[Turn]:
        text = re.sub(r"^\s*(?:[*#]+\s*)?(detailed )?description\s*:[*]*\s*", "", reply, flags=re.I).strip()
        if not text:
            raise Unparsed("the reply is empty")
        if any(mark.group(1) for mark in _LABEL.finditer(text)):
            raise Unparsed("a question stands where a description was asked for")
        return [Turn(pick.choice(list(questions)), text)]

    return parse


def says_no(answer: str) -> bool:
    return re.match(r"\W*(no|none|nobody|nothing|there (is|are|isn[’']t|aren[’']t) (no|not|n[’']t)\b)\b",
                    answer, re.I) is not None  # fmt: skip


def says_yes(answer: str) -> bool:
    return re.match(r"\W*yes\b", answer, re.I) is not None


def _example(name: str, values: Mapping[str, Any]) -> Context:
    """Return a picture that the worked examples of all kinds speak of."""
    boxes = tuple(AnnotatedBox(category, (x0, y0, x1, y1)) for category, x0, y0, x1, y1 in values["boxes"])
    return Context(f"example/{name}", values["image"], tuple(values["captions"]), boxes)


_EXAMPLES = read_yaml(Path(__file__).parents[1] / "tables" / "examples.yaml", "table of examples")
MARKET, SNOW = (_example(name, _EXAMPLES[name]) for name in ("market", "snow"))
