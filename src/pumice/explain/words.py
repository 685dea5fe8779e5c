"""Group the tokens of an answer into the words that a person reads."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

# Scripts without spaces between words, as the inside of a class in a pattern: each of their characters counts
# as a word. Thai and Lao, Burmese, Khmer, scripts of Thailand and Indonesia, Japanese, Chinese.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u1aaf\u1b00-\u1b7f\u3040-\u30ff\u3400-\u9fff"
    "\ua980-\uaadf\uf900-\ufaff\U00020000-\U0003ffff"
)

_CLITICS = ("", "'s", "'t", "n't", "'re", "'ve", "'ll", "'d", "'m")


@dataclass(frozen=True)
class Word:
    """One word: its text is answer[start:end], its tokens are first to last - 1."""

    text: str
    start: int
    end: int
    first: int
    last: int

    @property
    def is_drawn(self) -> bool:
        """Whether the word gets a panel of a strip: it is neither an article nor punctuation."""
        return any(map(str.isalnum, self.text)) and self.text.lower() not in ("a", "an", "the")

    @property
    def is_content(self) -> bool:
        """Whether the word names something (noun, verb, colour, number): it is no English function word."""
        word = self.text.lower().replace("’", "'")
        return any(map(str.isalnum, word)) and all(
            word.removesuffix(c) not in _function_words() for c in _CLITICS
        )


@lru_cache(maxsize=1)
def _function_words() -> frozenset[str]:
    """Return English function words; all other words count as content."""
    return frozenset((Path(__file__).parent / "function_words.txt").read_text(encoding="utf-8").split())


@lru_cache(maxsize=1)  # made when it is first needed: it takes 20 ms
def _word_pattern() -> re.Pattern[str]:
    # Vowel signs and accents, which `\w` leaves out, belong to the letter before them.
    marks = "".join(c for c in map(chr, range(0x300, 0x10000)) if unicodedata.category(c).startswith("M"))
    letter = rf"(?:[^\W{UNSPACED}][{marks}]*)"
    return re.compile(rf"[{UNSPACED}][{marks}]*|{letter}+(?:['’\-]{letter}+|[.,]\d+)*|[^\w\s]+")


def split(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> tuple[str, list[Word]]:
    """Return the text of an answer's ids, without blanks around it, and its words in order.

    A token belongs to the word of its first visible character. A token of blanks belongs to the next word. A
    word without a token of its own joins the word before it.
    """
    decoded = decode(ids)
    text = decoded.strip()
    shift = len(decoded) - len(decoded.lstrip())
    # 1. Find where each token's first visible character is in `text`. Decode growing prefixes, because the
    #    text of a token depends on the tokens before it.
    offsets = []
    begin = 0
    for count in range(len(ids)):
        end = max(begin, _common_length(decoded, decode(ids[: count + 1])))
        piece = decoded[begin:end]
        offsets.append(begin + len(piece) - len(piece.lstrip()) - shift)
        begin = end
    # 2. Give each word the tokens that start before its end.
    words: list[Word] = []
    token = 0
    for match in _word_pattern().finditer(text):
        start, stop = match.span()
        first = token
        while token < len(ids) and offsets[token] < stop:
            token += 1
        if token > first:
            words.append(Word(match.group(), start, stop, first, token))
        elif words:  # all of this word came with the token of the word before
            previous = words[-1]
            words[-1] = Word(text[previous.start : stop], previous.start, stop, previous.first, previous.last)
    return text, words


def averages(words: Sequence[Word], count: int) -> np.ndarray:
    """Return a matrix (W, n) that takes the mean over each word's tokens; count: n."""
    matrix = np.zeros((len(words), count), np.float32)
    for row, word in zip(matrix, words, strict=True):
        row[word.first : word.last] = 1 / (word.last - word.first)
    return matrix


def _common_length(text: str, prefix: str) -> int:
    """Count the characters that both begin with. The end of `prefix` may differ: half a character."""
    pairs = enumerate(zip(text, prefix, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(text), len(prefix)))
