"""Reading an option out of an answer, rule by rule of the official scorers."""

from __future__ import annotations

from random import Random

import pytest

from pumice.evaluate.metrics.choice import (
    infer_option,
    mmmu_open_right,
    mmmu_option,
    mmstar_right,
    parse_list,
    scienceqa_option,
)

CHOICES = {"A": "teddy bear", "B": "rabbit", "C": "cat", "D": "dog"}


@pytest.mark.parametrize(
    ("answer", "option"),
    [
        ("B", 1),
        ("B.", -1),  # two characters are neither form
        ("B. rabbit", 1),
        ("b", -1),
        ("E", -1),  # no such choice
        ("The answer is C.", 2),
        ("The answer is C!", 2),  # the dot of the pattern is any character
        ("The answer is C", -1),  # and there must be one
        ("The answer is A. The answer is B.", -1),
        ("(C)", -1),
        ("", -1),
    ],
)
def test_scienceqa(answer: str, option: int) -> None:
    assert scienceqa_option(answer, 4) == option


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"),
        ("(B) rabbit", "B"),
        ("C.", "C"),
        ("The answer is D", "D"),
        ("A and B", None),
        ("a", None),
        ("the rabbit", "B"),
        ("cat or dog", None),
        ("A very long story about a rabbit in the garden", None),  # the A is too early, the text too long
        ("A b c d e rabbit", "B"),  # so is this A, but the text is read
        ("Z", "Z"),
        ("Cannot determine the answer", "Z"),
        ("Not B", "B"),  # the official rules read no denial
        ("", None),
    ],
)
def test_mmbench(answer: str, letter: str | None) -> None:
    assert infer_option(answer, CHOICES) == letter


@pytest.mark.parametrize(
    "answer", ["B", "b", "(B)", "B. rabbit", "Option B", "The answer is B", "\n b", "bad"]
)
def test_mmstar_right(answer: str) -> None:
    assert mmstar_right(answer, "B")


@pytest.mark.parametrize("answer", ["", "A", "((B)", "It is B", "[B]", "option", "the answer is "])
def test_mmstar_wrong(answer: str) -> None:
    assert not mmstar_right(answer, "B")


def test_mmmu_takes_the_last_letter_and_brackets_first() -> None:
    options = ["one", "two", "three"]
    assert mmmu_option("(A), no, (B)", options, None) == "B"
    assert mmmu_option("A or B", options, None) == "B"
    assert mmmu_option("C.", options, None) == "C"
    assert mmmu_option("I believe that it is surely three", options, None) == "C"
    assert mmmu_option("three", options, None) is None  # not more than five words
    assert mmmu_option("", options, Random(42)) == Random(42).choice(["A", "B", "C"])


@pytest.mark.parametrize(
    ("answer", "truths", "right"),
    [
        ("The result is 1,234.5", ["1234.5"], True),
        ("x = 3.14159", ["3.14"], True),  # both to two decimals
        ("It is so 2.", ["3"], False),
        ("answer is a triangle", ["triangle"], True),
        ("b", ["a"], False),
        ("", ["x"], False),
        ("1.2e3", ["1200"], True),
        ("it is red", ["blue", "red"], True),
    ],
)
def test_mmmu_open(answer: str, truths: list[str], right: bool) -> None:
    assert mmmu_open_right(answer, truths) is right


@pytest.mark.usefixtures("bounded_work")
def test_long_numbers_are_read_in_time() -> None:
    for answer in ("1" * 300_000, f"0.{'1' * 300_000},", "1," * 100_000):
        assert not mmmu_open_right(f"it is {answer} of them", ["2"])


def test_lists_as_python_prints_them() -> None:
    assert parse_list("['a', 'b']") == ["a", "b"]
    assert parse_list("[0, 1)") == ["[0, 1)"]
    assert parse_list("a") == ["a"]
