"""Tokens become words: what a person reads, with every token in its place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from pumice.explain.words import averages, split


def grouped(pieces: Sequence[bytes]) -> tuple[str, list[tuple[str, int, int]]]:
    """The words of tokens that stand for these bytes."""
    text, words = split(
        range(len(pieces)), lambda ids: b"".join(pieces[i] for i in ids).decode(errors="replace")
    )
    for word in words:
        assert text[word.start : word.end] == word.text
    return text, [(word.text, word.first, word.last) for word in words]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([b"A", b" dog", b" runs", b"."], [("A", 0, 1), ("dog", 1, 2), ("runs", 2, 3), (".", 3, 4)]),
        ([b" A", b" small", b"ish", b" dog"], [("A", 0, 1), ("smallish", 1, 3), ("dog", 3, 4)]),
        ([b"a dog", b"'s", b" well-known"], [("a", 0, 1), ("dog's", 1, 2), ("well-known", 2, 3)]),
        ([b"is", b" ", b"3", b".", b"5"], [("is", 0, 1), ("3.5", 1, 5)]),  # the blank belongs to what follows
        ([b"3", b",", b" four"], [("3", 0, 1), (",", 1, 2), ("four", 2, 3)]),
        ([b"a", b"\n\n", b"b", b" \n"], [("a", 0, 1), ("b", 1, 3)]),
        (["犬が".encode(), "走".encode()[:1], "走".encode()[1:]], [("犬が", 0, 1), ("走", 1, 3)]),
        ([b"caf", "é".encode()[:1], "é".encode()[1:], b" x"], [("café", 0, 3), ("x", 3, 4)]),
        # Signs without a width of their own: Hindi, an accent apart from its letter, Thai without spaces.
        ([sign.encode() for sign in "स्ते दु"], [("स्ते", 0, 4), ("दु", 4, 7)]),
        ([b"cafe", "\u0301".encode(), b" noir"], [("cafe\u0301", 0, 2), ("noir", 2, 3)]),
        (["สวั".encode(), "ส".encode(), "ดี".encode()], [("สวั", 0, 1), ("ส", 1, 2), ("ดี", 2, 3)]),
        (["ᨠᨡ".encode(), "ꦄ".encode()], [("ᨠᨡ", 0, 1), ("ꦄ", 1, 2)]),  # of Thailand and Indonesia, too
        ([b" ", "😀".encode()[:2], "😀".encode()[2:]], [("😀", 0, 3)]),
        ([b"\xff", b"ok"], [("\ufffd", 0, 1), ("ok", 1, 2)]),
        ([b" ", b"\n"], []),
        ([], []),
    ],
)
def test_words_and_their_tokens(pieces: list[bytes], expected: list[tuple[str, int, int]]) -> None:
    assert grouped(pieces)[1] == expected


def test_text_loses_the_blanks_around_it() -> None:
    assert grouped([b"  A", b" dog\n"]) == ("A dog", [("A", 0, 1), ("dog", 1, 2)])


def test_content_words() -> None:
    pieces = [
        b"The",
        b" dog's",
        b" collar",
        b" isn't",
        b" blue",
        b",",
        b" can't",
        b" be",
        b" 2",
        b".",
        b" ok",
    ]
    words = split(range(len(pieces)), lambda ids: b"".join(pieces[i] for i in ids).decode())[1]
    assert [w.text for w in words if w.is_content] == ["dog's", "collar", "blue", "2", "ok"]


def test_averages() -> None:
    _, words = split(range(3), lambda ids: "".join([" small", "ish", " dog"][i] for i in ids))
    assert np.allclose(averages(words, 3), [[0.5, 0.5, 0], [0, 0, 1]])
