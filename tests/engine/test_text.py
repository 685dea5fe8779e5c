"""Deltas become text, whatever ends them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pumice.engine.params import SamplingParams
from pumice.engine.requests import Delta, Prompt
from pumice.engine.text import TextStream


def letters(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


def test_pieces_counts_and_the_end() -> None:
    text = TextStream(letters)
    assert text.add(Delta((72, 105), cached_tokens=7)) == "Hi"
    assert (text.finish, text.tokens, text.cached_tokens) == (None, 2, 7)
    assert text.add(Delta((33,), finish="length")) == "!"
    assert (text.finish, text.tokens) == ("length", 3)


def test_a_stop_string_ends_it_before_the_engine_knows() -> None:
    text = TextStream(letters, ("##",))
    assert [text.add(Delta((ord(c),))) for c in "a#b##c"] == ["a", "", "#b", "", "", ""]
    assert (text.finish, text.tokens) == ("stop", 5)
    assert text.add(Delta((), finish="cancelled")) == ""
    assert text.finish == "stop"


def test_what_was_held_back_comes_with_the_end() -> None:
    text = TextStream(letters, ("##",))
    assert text.add(Delta((35,))) == ""
    assert text.add(Delta((), finish="stop")) == "#"


def test_an_error_is_kept() -> None:
    text = TextStream(letters)
    wrong = RuntimeError("no memory")
    assert text.add(Delta((), finish="error", error=wrong)) == ""
    assert (text.finish, text.error) == ("error", wrong)


def test_the_space_of_a_format_before_an_answer_is_left_out() -> None:
    for tokens, expected in (("  a", " a"), (" a", "a"), ("a b", "a b"), (" ", ""), ("", "")):
        text = TextStream(letters, ("##",), " ")
        pieces = [text.add(Delta((ord(token),))) for token in tokens]
        assert "".join([*pieces, text.add(Delta((), finish="stop"))]) == expected
    # It may come in pieces, and what only begins like it is kept.
    for written, expected in (("A: yes", "yes"), ("A but", "A but"), ("A", "A")):
        text = TextStream(letters, (), "A: ")
        pieces = [text.add(Delta((ord(token),))) for token in written]
        assert "".join([*pieces, text.add(Delta((), finish="length"))]) == expected


def test_the_text_of_a_format_before_an_answer_ends_no_beam() -> None:
    params = SamplingParams(num_beams=2, stop=(":",))
    prompt = Prompt(torch.tensor([1]), params=params, prefix="A: ", decode=letters)
    for written, expected in (("A: yes", False), ("A: yes:", True), ("A but:", True)):
        assert prompt.holds_stop([*map(ord, written)]) is expected
