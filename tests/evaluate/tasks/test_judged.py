"""LLaVA-Bench and MM-Vet: means by hand, replies kept, what does not parse left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pumice.chat_client import ChatEndpoint, ask_in_order, with_images
from pumice.errors import InputError, WorkError
from pumice.evaluate.judge import Judge
from pumice.evaluate.tasks import get_task
from pumice.evaluate.tasks.llava_bench import parse_scores
from pumice.evaluate.tasks.mmvet import parse_grade


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("8 6\nThe first...", (8, 6)),
        ("8,6", (8, 6)),
        ("8, 6\n", (8, 6)),  # LLaVA's parser failed on this one
        ("7.5 9", (7.5, 9)),
        ("Scores: 8 6", None),
        ("8", None),
        ("", None),
        ("8 60", None),
        ("\n8 6", None),
    ],
)
def test_pairs_of_grades(reply: str, scores: tuple[float, float] | None) -> None:
    assert parse_scores(reply) == scores


@pytest.mark.parametrize(
    ("reply", "grade"),
    [("0.5", 0.5), ("1.0 because", 1), ("0.0\n", 0), ("1.5", None), ("Grade: 1", None), ("", None)],
)
def test_one_grade(reply: str, grade: float | None) -> None:
    assert parse_grade(reply) == grade


@pytest.fixture
def bench(data: Any) -> Any:
    kinds = {0: "conv", 1: "conv", 2: "detail"}
    data.lines("questions.jsonl", [
        {"question_id": n, "image": "001.jpg", "text": "What?", "category": kind} for n, kind in kinds.items()
    ])  # fmt: skip
    data.lines("context.jsonl", [{"id": "001", "image": "001.jpg", "caption": "A dog on a beach."}])
    data.lines("answers_gpt4.jsonl", [{"question_id": n, "text": "A dog."} for n in kinds])
    return data


def test_llava_bench(bench: Any, scored: Any, tmp_path: Path) -> None:
    reviews = tmp_path / "reviews.jsonl"
    # LLaVA's own review file; its tuple of -1 would have pulled the mean down.
    rows = [
        {"question_id": 0, "content": "8 6\nGood.", "tuple": [8, 6]},
        {"question_id": 1, "content": "Both are fine.", "tuple": [-1, -1]},
        {"question_id": 2, "content": "10 3", "tuple": [10, 3]},
    ]
    reviews.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task: Any = get_task("llava-bench")
    task.judge = Judge(reviews)
    result = scored("llava-bench", {n: "A cat." for n in range(3)}, task=task)
    assert result["headline"]["value"] == pytest.approx(100 * (6 + 3) / (8 + 10))
    assert result["categories"]["category"]["conv"] == {"value": 75, "questions": 1}
    assert result["judge"]["unparsed"] == 1
    assert result["judge"]["used"] == 2


def test_a_judge_is_needed_and_so_are_all_replies(bench: Any, scored: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="scored by a judge"):
        scored("llava-bench", {n: "A cat." for n in range(3)})
    reviews = tmp_path / "reviews.jsonl"
    reviews.write_text('{"question_id": 0, "content": "8 6"}\n')
    task: Any = get_task("llava-bench")
    task.judge = Judge(reviews)
    with pytest.raises(InputError, match=r"no reply to 2 of 3 answers \(first: 1\)"):
        scored("llava-bench", {n: "A cat." for n in range(3)}, task=task)
    reviews.write_text('{"question_id": 0, "content": "8 6"}\n{"quest\n')
    with pytest.raises(InputError, match=r"1 line is cut off .* is line 2; remove what is damaged, it will"):
        Judge(reviews)
    # A last line that no crash can have cut off is somebody's, and stays.
    reviews.write_text('{"question_id": 0, "content": "8 6"}\nmy notes')
    with pytest.raises(InputError, match="1 line is cut off"):
        Judge(reviews, ChatEndpoint("http://127.0.0.1:9/v1", "judge"))
    assert reviews.read_text().endswith("my notes")
    reviews.write_bytes(b"\xff\n")  # it is the user's own: nobody can fetch it
    with pytest.raises(InputError, match="is not UTF-8 text; save it as UTF-8"):
        Judge(reviews)


@pytest.fixture
def mmvet(data: Any) -> Any:
    data.json("mm-vet.json", {
        "v1_0": {
            "imagename": "v1_0.png", "question": "x?", "answer": "-1<AND>-5", "capability": ["ocr", "math"],
        },
        "v1_1": {"imagename": "v1_1.png", "question": "y?", "answer": "dog<OR>hound", "capability": ["rec"]},
        "v1_2": {"imagename": "v1_2.png", "question": "z?", "answer": "no", "capability": ["rec", "math"]},
    })  # fmt: skip
    return data


def test_mmvet_asks_keeps_and_does_not_ask_again(
    mmvet: Any, scored: Any, tmp_path: Path, chat_server: Any
) -> None:
    reviews = tmp_path / "grades.jsonl"
    server = chat_server("0.5", "1.0", "I cannot say")
    task: Any = get_task("mmvet")
    task.judge = Judge(reviews, server.endpoint())
    answers = {"v1_0": "-1", "v1_1": "a hound", "v1_2": "yes"}
    result = scored("mmvet", answers, task=task)
    assert result["headline"]["value"] == pytest.approx(75)  # the third is in no mean
    assert result["categories"]["ability"]["math"] == {"value": 50, "questions": 1}
    assert result["judge"] | {"file": None} == {
        "models": ["judge-1"], "prompt_versions": ["pumice-mmvet-1"], "replies": 3, "unparsed": 1, "used": 2,
        "file": None,
    }  # fmt: skip
    assert "-1 <AND> -5" in server.asked[0]["messages"][0]["content"]
    stored = [json.loads(line) for line in reviews.read_text().splitlines()]
    assert [row["reply"] for row in stored] == ["0.5", "1.0", "I cannot say"]
    task.judge = Judge(reviews)
    assert scored("mmvet", answers, task=task)["headline"] == result["headline"]
    # A kill in the middle of a line: the reply is asked for again, and the line is gone.
    reviews.write_text(reviews.read_text()[:-9])
    server = chat_server("I still cannot say")
    task.judge = Judge(reviews, server.endpoint())
    assert scored("mmvet", answers, task=task)["headline"] == result["headline"]
    assert len(server.asked) == 1
    assert [json.loads(line)["id"] for line in reviews.read_text().splitlines()] == ["v1_0", "v1_1", "v1_2"]
    # Another answer has another prompt: its reply is not there.
    task.judge = Judge(reviews)
    with pytest.raises(InputError, match="no reply to 1 of 3"):
        scored("mmvet", answers | {"v1_1": "a dog"}, task=task)


def test_mmvet_grades_of_its_own_evaluator_and_rows_of_llava(mmvet: Any, scored: Any, tmp_path: Path) -> None:
    grades = {f"v1_{n}": {"model": ["gpt-4-0613"], "content": [text], "score": [0]} for n, text in
              enumerate(("0.0", "1.0", "0.5"))}  # fmt: skip
    (tmp_path / "grades.json").write_text(json.dumps(grades, indent=4))
    task: Any = get_task("mmvet")
    task.judge = Judge(tmp_path / "grades.json")
    rows = [{"question_id": n, "prompt": "?", "text": "x"} for n in range(3)]
    result = scored("mmvet", rows, task=task)
    assert result["headline"]["value"] == pytest.approx(50)
    assert result["judge"]["models"] == ["gpt-4-0613"]
    # New replies are not written behind the object, whose file would then be no JSON any more.
    for text in (json.dumps(grades, indent=4), json.dumps(grades, indent=4) + "\n"):
        (tmp_path / "grades.json").write_text(text)
        task.judge = Judge(tmp_path / "grades.json", ChatEndpoint("http://127.0.0.1:9/v1", "judge"))
        with pytest.raises(InputError, match=r"one JSON object.* \(1, first: v1_9\); name another"):
            task.grade([("v1_0", "?"), ("v1_9", "?")], parse_grade)
        assert (tmp_path / "grades.json").read_text() == text
    # Where the object is cut off, no line of it is asked again.
    (tmp_path / "grades.json").write_text(json.dumps(grades, indent=4)[:-30])
    with pytest.raises(InputError, match=r"grades\.json' is cut off or not JSON .*a right row is \{"):
        Judge(tmp_path / "grades.json")


def test_mmvet_names_the_abilities_without_a_grade(mmvet: Any, scored: Any, tmp_path: Path) -> None:
    reviews = tmp_path / "grades.jsonl"
    grades = {"v1_0": "0.5", "v1_1": "I cannot say", "v1_2": "I cannot say"}
    reviews.write_text("".join(json.dumps({"id": key, "reply": text}) + "\n" for key, text in grades.items()))
    task: Any = get_task("mmvet")
    task.judge = Judge(reviews)
    abilities = scored("mmvet", dict.fromkeys(grades, "x"), task=task)["categories"]["ability"]
    assert abilities["math"] == {"value": 50, "questions": 1}
    assert abilities["rec"] == {"value": None, "questions": 0}


def test_an_endpoint_is_tried_again_and_refusals_are_told(chat_server: Any) -> None:
    def say(*replies: Any) -> Any:
        chat = {"messages": [{"role": "user", "content": "hello"}]}
        return next(ask_in_order(chat_server(*replies).endpoint(), [chat]))

    assert say(503, 429, "fine")[:2] == ("fine", "judge-1")
    assert say("")[:2] == ("", "judge-1")  # an answer like any other
    with pytest.raises(WorkError, match=r"did not answer in 5 tries \(500 no\)"):
        say(*[500] * 5)
    with pytest.raises(InputError, match=r"refuses the key in \$OPENAI_API_KEY \(401"):
        say(401)
    assert "does not take the request (400: no); check the model's name" in str(say(400))
    with pytest.raises(InputError, match="is no address"):
        ChatEndpoint("localhost:8000", "m").check()


def test_pictures_go_where_the_text_says() -> None:
    one = with_images("What?", [b"\x89PNG"])
    assert [part["type"] for part in one] == ["image_url", "text"]
    assert one[0]["image_url"]["url"] == "data:image/png;base64,iVBORw=="
    two = with_images("<image> and <image>?", [b"\x89PNGa", b"\x89PNGb"])
    assert [part["type"] for part in two] == ["image_url", "text", "image_url", "text"]
