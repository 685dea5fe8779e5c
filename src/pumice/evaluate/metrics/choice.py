"""Read the chosen option from an answer, as the official scorers of multiple-choice benchmarks do.

Sources: LLaVA's eval_science_qa.py for ScienceQA; VLMEvalKit's matching_util.py, without its language model,
for MMBench; mmstar.py for MMStar; eval_utils.py for MMMU.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from random import Random

_THE_ANSWER = re.compile(r"The answer is ([A-Z]).")  # the last dot matches any character, as in the original
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def scienceqa_option(answer: str, choices: int) -> int:
    """Return the index of the option, -1 where none is read: "C", "C. ...", or one "The answer is C."."""
    letters = "ABCDE"
    if len(answer) == 1 and answer in letters:
        letter = answer
    elif len(answer) >= 3 and answer[0] in letters and answer[1:3] == ". ":
        letter = answer[0]
    else:
        matches = _THE_ANSWER.findall(answer)
        letter = matches[0] if len(matches) == 1 else "?"
    return letters[:choices].find(letter)


def infer_option(answer: str, choices: Mapping[str, str]) -> str | None:
    """Return the letter that an answer names or whose text it holds; "Z" for a refusal; None if unclear.

    choices: letter -> text. A letter counts if no other option's letter is among the words, and if it
    first appears among the last four words.
    """
    # 1. A failed request is no refusal: only the texts of the options can decide it.
    failed = "Failed to obtain answer via API" in answer
    if not failed and any(refusal in answer for refusal in _REFUSALS):
        return "Z"
    # 2. Look for a letter.
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    named = [letter for letter in choices if letter in words]
    if len(named) == 1 and not failed and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and not failed and "Z" in words:
        return "Z"
    # 3. Look for the text of an option; a long answer may quote any of them.
    answer = answer.lower()
    texts = {letter: str(text).lower() for letter, text in choices.items()}
    if len(answer) > 2 * sum(map(len, texts.values())):
        return None
    matches = [letter for letter, text in texts.items() if text in answer]
    return matches[0] if len(matches) == 1 else None


def mmstar_right(answer: str, truth: str) -> bool:
    """Return whether the answer starts with the letter, alone or after "(", "option" or "the answer is"."""
    text, letter = _one_line(answer), _one_line(truth)
    prefixes = ("", "(", "option ", "the answer is ")
    return any(text.startswith(p) and text[len(p) : len(p) + 1] == letter for p in prefixes)


def _one_line(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def mmmu_option(answer: str, options: Sequence[str], random: Random | None) -> str | None:
    """Return the letter that MMMU reads: the last "(B)", else the last " B ", else the last option's text.

    Where no letter is read, the official scorer draws one with seed 42. `random` draws it here; without
    `random` the function returns None.
    """
    for mark in (",", ".", "!", "?", ";", ":", "'"):
        answer = answer.strip(mark)
    answer = f" {answer} "
    texts = {chr(ord("A") + number): text for number, text in enumerate(options)}
    for form in ("({})", " {} "):
        if matches := [letter for letter in texts if form.format(letter) in answer]:
            return max(matches, key=lambda letter: answer.rfind(form.format(letter)))
    lower = answer.lower()
    if len(answer.split()) > 5 and (matches := [k for k, text in texts.items() if text.lower() in lower]):
        return max(matches, key=lambda letter: lower.rfind(texts[letter].lower()))
    return random.choice(list(texts)) if random is not None else None


_WITH_COMMAS = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
# The official patterns, which also try each number from its second digit on, always in vain.
_SCIENTIFIC = re.compile(r"(?:-|(?<!\d))\d+(?:\.\d+)?[eE][+-]?\d+")
_SIMPLE = re.compile(r"(?:-|(?<!\d)|(?=\.))(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")
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
    """Return, for each sentence, the shortest text after a word such as "is"; "=" counts in the last one."""
    answer = answer.strip().strip(".").lower()
    sentences = _SENTENCE_END.split(answer)
    parts = []
    for number, sentence in enumerate(sentences, 1):
        indicators = (*_INDICATORS, "=") if number == len(sentences) else _INDICATORS
        tails = [sentence.split(word)[-1].strip() for word in indicators if word in sentence]
        shortest = ""
        for tail in tails:  # the next text replaces an empty one, as in the original
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            parts.append(shortest)
    return parts or [answer]


def mmmu_open_right(answer: str, truths: Sequence[str]) -> bool:
    """Return whether MMMU finds a truth (a number or a text) among the key parts of an open answer."""
    parts = _key_parts(answer)
    numbers = [
        n for part in parts for pattern in (_WITH_COMMAS, _SCIENTIFIC, _SIMPLE) for n in pattern.findall(part)
    ]
    answer_forms = [form for text in [*parts, *numbers] for form in _normalised(text)]
    truth_forms = [form for truth in truths for form in _normalised(truth)]
    texts = [form for form in truth_forms if isinstance(form, str)]
    return any(
        any(text in form for text in texts) if isinstance(form, str) else form in truth_forms
        for form in answer_forms
    )


def parse_list(text: str) -> list[str]:
    """Read a list as Python prints it (MMMU stores lists so); any other text becomes a list of one."""
    if text.startswith("["):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return [text]
        if isinstance(value, list):
            return [str(v) for v in value]
    return [text]
