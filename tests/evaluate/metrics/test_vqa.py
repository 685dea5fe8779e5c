"""The answer processors, by hand from the official rules: their slips first of all."""

from __future__ import annotations

import pytest

from pumice.evaluate.metrics.vqa import (
    CONTRACTIONS,
    leave_one_out,
    normalize_m4c,
    textvqa_accuracy,
    vizwiz_accuracy,
    vqa_accuracy,
    vqa_accuracy_first,
)


@pytest.mark.parametrize(
    ("answer", "processed"),
    [
        ("", ""),
        ("Yes.", "yes"),
        ("no, it is not", "no it is not"),
        ("The Two dogs", "2 dogs"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("somebody'd", "somebodyd"),  # the list's own slip
        ("Bob's car", "bob 's car"),
        ("red\nblue\tgreen", "red blue green"),
        ("1,000", "1000"),
        ("a-b", "b"),  # "-" becomes a space, then the article goes
        ("a - b", "b"),
        ("50 mph!", "50 mph"),
        ("(A)", ""),
        ("3.5", "3.5"),
        ("5.", "5"),  # meant to stay, but "(?!<=" looks for a text that never is there
        ("route 66. north", "route 66 north"),
        ("Écrit en 日本", "écrit en 日本"),
        ("x" + "." * 40, "x" + "." * 8),  # re.UNICODE, 32, is the count
    ],
)
def test_the_processor_of_m4c(answer: str, processed: str) -> None:
    assert normalize_m4c(answer) == processed


def test_the_corrected_processor_keeps_a_period_after_a_digit_and_removes_all_others() -> None:
    assert normalize_m4c("5.", corrected=True) == "5."
    assert normalize_m4c("x" + "." * 40, corrected=True) == "x"


def test_the_contractions_are_the_official_number() -> None:
    assert len(CONTRACTIONS) == 120
    assert CONTRACTIONS["wont"] == "won't"
    assert CONTRACTIONS["aint"] == "ain't"


def test_leave_one_out_by_hand() -> None:
    # 2 of 10 said it: those two see one other (1/3 each), the eight see two (2/3 each).
    answers = ["red"] * 2 + ["blue"] * 8
    assert leave_one_out("red", answers) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert leave_one_out("blue", answers) == 1
    assert leave_one_out("green", answers) == 0
    assert leave_one_out("red", ["red"]) == 0


def test_textvqa_processes_both_sides() -> None:
    assert textvqa_accuracy("STOP.", ["stop"] * 4 + ["Stop!"] * 6) == 1
    # One period after a digit: the slip takes it away on both sides, the corrected one on neither.
    assert textvqa_accuracy("5", ["5."] * 10) == 1
    assert textvqa_accuracy("5", ["5."] * 10, corrected=True) == 0


def test_vqa_leaves_unanimous_answers_and_the_prediction_as_they_are() -> None:
    assert vqa_accuracy("Yes.", ["yes"] * 10) == 0
    assert vqa_accuracy_first("Yes.", ["yes"] * 10) == 1
    assert vqa_accuracy("Yes.", ["yes"] * 9 + ["no"]) == 1
    assert vqa_accuracy("dog", ["a dog"] * 9 + ["cat"]) == 1
    assert vqa_accuracy_first("dog", ["a dog"] * 9 + ["cat"]) == 0  # its truths keep their articles


def test_vizwiz_takes_the_answers_as_they_are() -> None:
    assert vizwiz_accuracy("Unanswerable", ["unanswerable"] * 10) == 1
    assert vizwiz_accuracy("a can", ["a can"] * 10) == 0
