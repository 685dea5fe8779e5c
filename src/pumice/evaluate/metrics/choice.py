"""Which option an answer chose, as the official scorers of multiple-choice benchmarks read it.

ScienceQA: LLaVA's eval_science_qa.py. MMBench: VLMEvalKit's matching_util.py, without a language model
for what its rules cannot read. MMStar: its mmstar.py. MMMU: its eval_utils.py. Knows texts only.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from random import Random

_THE_ANSWER = re.compile(r"The answer is ([A-Z]).")  # the last dot is any character, as in the original
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def scienceqa_option(answer: str, choices: int) -> int:
    """The option's number, -1 where none is read: "C", "C. ...", or one "The answer is C."."""
    letters = "ABCDE"
    if len(answer) == 1 and answer in letters:
        letter = answer
    elif len(answer) >= 3 and answer[0] in letters and answer[1:3] == ". ":
        letter = answer[0]
    else:
        found = _THE_ANSWER.findall(answer)
        letter = found[0] if len(found) == 1 else "?"
    return letters[:choices].find(letter)


def infer_option(answer: str, choices: Mapping[str, str]) -> str | None:
    """The letter that an answer names or whose text it holds; "Z" for a refusal; None if unclear.

    choices: letter -> text. A letter counts when it is the only option's among the words and first
    stands among the last four of them.
    """
    failed = "Failed to obtain answer via API" in answer
    if not failed and any(refusal in answer for refusal in _REFUSALS):
        return "Z"
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    named = [letter for letter in choices if letter in words]
    if len(named) == 1 and not failed and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and not failed and "Z" in words:
        return "Z"
    answer = answer.lower()
    texts = {letter: str(text).lower() for letter, text in choices.items()}
    if len(answer) > 2 * sum(map(len, texts.values())):
        return None
    held = [letter for letter, text in texts.items() if text in answer]
    return held[0] if len(held) == 1 else None


def mmstar_right(answer: str, truth: str) -> bool:
    """Whether the answer starts with the letter, bare, in a bracket, or after "option" or "the answer is"."""
    said, wanted = _one_line(answer), _one_line(truth)
    starts = ("", "(", "option ", "the answer is ")
    return any(said.startswith(start) and said[len(start) : len(start) + 1] == wanted for start in starts)


def _one_line(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def mmmu_option(answer: str, options: Sequence[str], random: Random | None) -> str | None:
    """The letter that MMMU reads: the last "(B)", else the last " B ", else the last option's text.

    The official scorer draws a letter where it reads none; `random` (seeded with 42 there) does so, and
    None says that none is read.
    """
    for mark in (",", ".", "!", "?", ";", ":", "'"):
        answer = answer.strip(mark)
    answer = f" {answer} "
    texts = {chr(ord("A") + number): text for number, text in enumerate(options)}
    for form in ("({})", " {} "):
        if found := [letter for letter in texts if form.format(letter) in answer]:
            return max(found, key=lambda letter: answer.rfind(form.format(letter)))
    lower = answer.lower()
    if len(answer.split()) > 5 and (found := [k for k, text in texts.items() if text.lower() in lower]):
        return max(found, key=lambda letter: lower.rfind(texts[letter].lower()))
    return random.choice(list(texts)) if random is not None else None


_WITH_COMMAS = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_SIMPLE = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_SENTENCE_END = re.compile(r"\.\s(?=[A-Z])|\n")


def _normalised(text: str) -> list[str | float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _key_parts(answer: str) -> list[str]:
    """What follows words such as "is", the shortest of each sentence; "=" counts in the last one."""
    answer = answer.strip().strip(".").lower()
    sentences = _SENTENCE_END.split(answer)
    parts = []
    for number, sentence in enumerate(sentences, 1):
        indicators = (*_INDICATORS, "=") if number == len(sentences) else _INDICATORS
        tails = [sentence.split(word)[-1].strip() for word in indicators if word in sentence]
        shortest = ""
        for tail in tails:  # an empty one is replaced by whatever comes next, as in the original
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            parts.append(shortest)
    return parts or [answer]


def mmmu_open_right(answer: str, truths: Sequence[str]) -> bool:
    """Whether MMMU finds a truth, a number or a text, among the key parts of an open answer."""
    parts = _key_parts(answer)
    numbers = [
        n for part in parts for find in (_WITH_COMMAS, _SCIENTIFIC, _SIMPLE) for n in find.findall(part)
    ]
    said = [form for text in [*parts, *numbers] for form in _normalised(text)]
    wanted = [form for truth in truths for form in _normalised(truth)]
    texts = [form for form in wanted if isinstance(form, str)]
    return any(
        any(text in form for text in texts) if isinstance(form, str) else form in wanted for form in said
    )


def as_list(text: str) -> list[str]:
    """MMMU and others write lists as Python prints them; anything else is a list of one."""
    if text.startswith("["):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return [text]
        if isinstance(value, list):
            return [str(v) for v in value]
    return [text]
