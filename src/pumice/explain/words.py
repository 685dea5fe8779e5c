"""Tokens of an answer, grouped to the words that a person reads.

Knows: ids and a function that decodes them. Does not know: tokenizers, models, pictures.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# Scripts that put no spaces between words: each of their characters is a word here.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_LETTER = rf"[^\W{_UNSPACED}]"
_WORD = re.compile(rf"[{_UNSPACED}]|{_LETTER}+(?:['’\-]{_LETTER}+|[.,]\d+)*|[^\w\s]+")

# English words that hold sentences together; every other word is counted as content.
_FUNCTION_WORDS = """
a an the this that these those some any each every all both either neither no not such
i you he she it we they me him her us them my your his its our their mine yours hers ours theirs
myself yourself himself herself itself ourselves themselves who whom whose which what when where why how
there here be am is are was were been being do does did done doing have has had having
will would shall should can could may might must
of in on at by for with from to into onto over under above below up down out off about against between
through during before after behind beside besides near next along across around among within without
toward towards upon as than like
and or but nor so yet if because while although though until unless since whether
very too also just only even then now again more most much many other another same own
won't shan't yes
"""
_FUNCTION = frozenset(_FUNCTION_WORDS.split())
_CLITICS = ("", "'s", "'t", "n't", "'re", "'ve", "'ll", "'d", "'m")


@dataclass(frozen=True)
class Word:
    """text stands at answer[start:end]; its tokens are those numbered first to last - 1."""

    text: str
    start: int
    end: int
    first: int
    last: int

    @property
    def is_content(self) -> bool:
        """Whether it names something (a noun, verb, colour or number), by a closed list of English words."""
        word = self.text.lower().replace("’", "'")
        return any(map(str.isalnum, word)) and all(word.removesuffix(c) not in _FUNCTION for c in _CLITICS)


def split(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> tuple[str, list[Word]]:
    """The text of an answer's ids, blanks around it cut off, and its words in order.

    A token belongs to the word in which its first visible character stands, or begins to stand; one that
    makes blanks alone to the word behind them; and a word without a token of its own joins the one before.
    """
    whole = decode(ids)
    text = whole.strip()
    shift = len(whole) - len(whole.lstrip())
    places = []  # of each token's first visible character, in `text`
    begin = 0
    for count in range(len(ids)):
        end = max(begin, _agreement(whole, decode(ids[: count + 1])))
        made = whole[begin:end]
        places.append(begin + len(made) - len(made.lstrip()) - shift)
        begin = end
    words: list[Word] = []
    token = 0
    for match in _WORD.finditer(text):
        start, stop = match.span()
        first = token
        while token < len(ids) and places[token] < stop:
            token += 1
        if token > first:
            words.append(Word(match.group(), start, stop, first, token))
        elif words:  # all of it came with the token before
            before = words[-1]
            words[-1] = Word(text[before.start : stop], before.start, stop, before.first, before.last)
    return text, words


def averages(words: Sequence[Word], count: int) -> np.ndarray:
    """(W, n): a matrix that takes the mean over each word's tokens."""
    matrix = np.zeros((len(words), count), np.float32)
    for row, word in zip(matrix, words, strict=True):
        row[word.first : word.last] = 1 / (word.last - word.first)
    return matrix


def _agreement(whole: str, part: str) -> int:
    """How many characters `part` begins with as `whole` does: half a character decodes to something else."""
    pairs = enumerate(zip(whole, part, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(whole), len(part)))
