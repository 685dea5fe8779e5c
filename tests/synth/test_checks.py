"""Every check passes what it should and has an input that it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from pumice.errors import InputError
from pumice.synth import kinds
from pumice.synth.checks import CheckSettings, Rejection, examine, is_refusal, row
from pumice.synth.context import AnnotatedBox, Context
from pumice.synth.kinds.base import MARKET, SNOW, Draft, Turn, Unparsed, pairs
from pumice.synth.objects import Vocabulary

VOCABULARY = Vocabulary()
PARK = Context(
    "park",
    "park.jpg",
    ("A man throws a red frisbee to his dog in a park.",),
    (AnnotatedBox("person", (0.1, 0.1, 0.3, 0.9)), AnnotatedBox("dog", (0.5, 0.5, 0.8, 0.9))),
)


def examined(kind: str, reply: str, context: Context = PARK, **settings: Any) -> Draft | Rejection:
    return examine(kinds.get(kind), context, reply, VOCABULARY, CheckSettings(**settings))


@pytest.mark.parametrize("kind", list(kinds.builtin()))
def test_worked_examples_pass_their_own_checks(kind: str) -> None:
    assert len(kinds.get(kind).examples) == 2
    for example in kinds.get(kind).examples:
        examination = examined(kind, example.reply, example.context)
        assert isinstance(examination, Draft), examination


def talk(*turns: str) -> str:
    return "\n".join(f"{'Question' if n % 2 == 0 else 'Answer'}: {text}" for n, text in enumerate(turns))


GOOD = ("What does the man throw?", "He throws a red frisbee.", "Who runs after it?", "A dog runs after it.")
LONG = (
    "A man stands in a park and throws a red frisbee to his dog. The dog is on the right and looks up, while "
    "the man is on the left."
)


@pytest.mark.parametrize(
    ("kind", "reply", "reason"),
    [
        ("conversation", talk(*GOOD), None),
        ("detail", LONG, None),
        ("conversation", "I'm sorry, I can't help with that.", "refusal"),
        ("conversation", "", "not parsed"),
        ("conversation", "The man plays with his dog.", "not parsed"),
        ("conversation", talk(*GOOD, "And where?"), "not parsed"),
        ("conversation", talk(*GOOD[:2]), "number of turns"),
        ("conversation", talk(*GOOD[:3], "According to the captions, a dog does."), "speaks of its source"),
        ("conversation", talk(*GOOD[:3], "The description says a dog."), "speaks of its source"),
        ("conversation", talk(*GOOD[:3], "A dog, bounding box on the right."), "speaks of its source"),
        ("detail", LONG + " It is at [0.500, 0.500, 0.800, 0.900].", "speaks of its source"),
        ("conversation", talk(*GOOD[:3], "The notes say that a dog does."), "speaks of its source"),
        ("conversation", talk(*GOOD[:3], "In the context of the game, the dog: the label says so."), None),
        ("conversation", talk(*GOOD[:3], "As an AI, I think it is a dog."), "speaks of itself"),
        ("conversation", talk(*GOOD[:3], "I cannot see the image, perhaps a dog."), "speaks of itself"),
        ("detail", "A man and a dog.", "length"),
        ("short-answer", talk("Who?", "The man who throws the red frisbee", "What?", "Frisbee"), "length"),
        ("conversation", talk(*GOOD[:2], *GOOD[:2]), "repetition"),
        ("detail", "The man throws the frisbee to the dog. " * 6, "repetition"),
        ("detail", LONG + " The dog is very very very happy.", "repetition"),
        ("detail", LONG + " Behind them stand two horses and a bicycle.", "unsupported objects"),
        ("conversation", talk(*GOOD[:3], "A cat, watched by a cow."), "unsupported objects"),
        ("detail", LONG + " No horse and no bicycle is there, nor can one see a car.", None),
        ("hard-negatives", talk("Is there a cat?", "No.", "Is a dog there?", "No."), "kind"),
        ("hard-negatives", talk("Is there a cat?", "Yes.", "Is a bird there?", "No."), "kind"),
        ("hard-negatives", talk("Is there a dog?", "No.", "Is a man there?", "Yes."), "kind"),
        ("hard-negatives", talk("Is there a cat?", "No, but a dog.", "Does he throw?", "Yes."), None),
        ("unanswerable", talk("What is the dog's name?", "It is called Rex."), "kind"),
        ("unanswerable", talk("What is the dog's name?", "One can't tell its name from the picture."), None),
        ("detail", "Ein Mann steht im Park und wirft seinem Hund eine rote Scheibe zu. Der Hund steht rechts "
         "und schaut nach oben, und der Mann steht auf der linken Seite des Bildes.", "language"),
    ],
)  # fmt: skip
def test_reasons(kind: str, reply: str, reason: str | None) -> None:
    examination = examined(kind, reply)
    if reason is None:
        assert isinstance(examination, Draft), examination
    else:
        assert isinstance(examination, Rejection)
        assert examination.reason == reason, examination
        assert examination.detail or not reply


def test_settings() -> None:
    two = LONG + " Behind them stand two horses and a bicycle."
    assert isinstance(examined("detail", two, unsupported=2), Draft)
    assert examined("detail", LONG + " A horse.", unsupported=0) == Rejection(
        "unsupported objects", "horse: 1 not in the annotations, 0 allowed"
    )


@pytest.mark.parametrize(
    "reply",
    [
        "Question: A?\nAnswer: B.",
        "Q: A?\nA: B.",
        "**Question 1:** A?\n\n**Answer 1:** B.",
        "Question: A?\n===\nAnswer: B.\n===",
        "User: A?\r\nAssistant: B.\r\n",
        "Here you are:\n\nQuestion:\nA?\nAnswer:\nB.",
    ],
)
def test_forms_of_pairs(reply: str) -> None:
    assert pairs(reply) == [Turn("A?", "B.")]


def test_answers_of_several_lines() -> None:
    assert pairs("Question: A?\nAnswer: B.\n\nC.") == [Turn("A?", "B.\n\nC.")]


@pytest.mark.parametrize(
    ("reply", "expected_reason"),
    [
        ("Answer: B.", "an answer stands where a question should"),
        ("Question: A?\nQuestion: B?\nAnswer: C.", "a question stands where an answer should"),
        ("Question: A?\nAnswer:\nQuestion: B?\nAnswer: C.", "the answer of turn 1 is empty"),
        ("Question: A?", "the last question has no answer"),
        ("Nothing.", "no line begins with 'Question:'"),
    ],
)
def test_not_pairs(reply: str, expected_reason: str) -> None:
    with pytest.raises(Unparsed, match=expected_reason):
        pairs(reply)


def test_rows_are_llavas() -> None:
    draft = examined("short-answer", talk("What flies?", "Frisbee", "Who throws?", "Man"))
    assert isinstance(draft, Draft)
    assert row("x", draft) == {
        "id": "x",
        "image": "park.jpg",
        "conversations": [
            {
                "from": "human",
                "value": "<image>\nWhat flies?\nAnswer the question using a single word or phrase.",
            },
            {"from": "gpt", "value": "Frisbee"},
            {"from": "human", "value": "Who throws?"},
            {"from": "gpt", "value": "Man"},
        ],
    }


def test_the_question_of_a_description_is_drawn_by_seed() -> None:
    def asked(seed: int) -> str:
        examination = examine(kinds.get("detail"), PARK, LONG, VOCABULARY, CheckSettings(), seed)
        assert isinstance(examination, Draft)
        return examination.turns[0].question

    assert [asked(n) for n in range(8)] == [asked(n) for n in range(8)]
    assert len({asked(n) for n in range(8)}) > 2


def test_is_refusal() -> None:
    assert is_refusal("I\u2019m sorry, but I cannot do that.")
    assert not is_refusal("Question: Why is the boy sorry?\nAnswer: I cannot tell.")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Two men and some children walk.", ["man", "child"]),
        ("A hot dog on a plate", ["hot dog"]),
        ("the bus stop", []),
        ("three buses, knives and geese", ["bus", "knife", "bird"]),
        ("an orange shirt", []),
        ("a bowl of oranges", ["bowl", "orange fruit"]),
        ("a teddy bear on the sofa", ["teddy bear", "couch"]),
        ("an animal", ["animal"]),
    ],
)
def test_named(text: str, names: list[str]) -> None:
    assert VOCABULARY.named(text) == names


def test_support() -> None:
    objects = VOCABULARY.known(PARK)
    assert objects == {"person", "man", "frisbee", "dog"}
    assert VOCABULARY.unsupported("A guy pets an animal. It is no cat, some people say.", objects) == []
    assert VOCABULARY.unsupported("A woman and a boy wait for someone.", objects) == ["woman"]
    assert VOCABULARY.unsupported("A woman sits.", frozenset({"person"})) == []
    assert VOCABULARY.unsupported("A woman sits.", frozenset({"man", "people"})) == []
    assert VOCABULARY.unsupported("A toy lies by the puppy and a vehicle.", objects) == ["vehicle"]
    assert VOCABULARY.known(SNOW) == {"dog", "sports ball", "snow"}
    assert "bench" not in VOCABULARY.known(MARKET)


def test_categories_of_the_annotations_are_known_too() -> None:
    assert Vocabulary(["Lamp post", "orange"]).named("two lamp posts, an orange") == ["lamp post"]


def test_a_kind_in_a_file(tmp_path: Any) -> None:
    path = tmp_path / "haiku.py"
    path.write_text(
        "from pumice.synth.kinds.base import Kind, whole\n"
        "KIND = Kind('haiku', 'Write a haiku.', (), whole(['A poem?']), words=(3, 20))\n"
    )
    assert kinds.get(str(path)).name == "haiku"
    path.write_text("x = (")
    with pytest.raises(InputError, match=r"cannot be run \(SyntaxError"):
        kinds.get(str(path))
    path.write_text("x = 1\n")
    with pytest.raises(InputError, match="defines no KIND"):
        kinds.get(str(path))
