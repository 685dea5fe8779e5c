"""VQAv2, GQA, VizWiz, TextVQA, POPE and MME: official layouts made small, scores computed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pumice.errors import InputError
from pumice.evaluate.result import read_questions
from pumice.evaluate.task import Answered
from pumice.evaluate.tasks import get_task

SHORT = "Answer the question using a single word or phrase."


def people(*texts: str) -> list[dict[str, Any]]:
    return [{"answer": text, "answer_id": n, "answer_confidence": "yes"} for n, text in enumerate(texts, 1)]


@pytest.fixture
def vqav2(data: Any) -> Any:
    questions = [
        {"image_id": 42, "question": "What color?", "question_id": 42000},
        {"image_id": 42, "question": "How many?", "question_id": 42001},
        {"image_id": 73, "question": "Is it?", "question_id": 73000},
    ]
    annotations = [
        {"question_id": 42000, "image_id": 42, "question_type": "what color", "answer_type": "other",
         "answers": people(*["red"] * 2, *["blue"] * 8)},
        {"question_id": 42001, "image_id": 42, "question_type": "how many", "answer_type": "number",
         "answers": people(*["2"] * 9, "two")},
        {"question_id": 73000, "image_id": 73, "question_type": "is it", "answer_type": "yes/no",
         "answers": people(*["yes"] * 10)},
    ]  # fmt: skip
    data.json("v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    data.json("v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    return data


def test_vqav2(vqav2: Any, scored: Any, asked: Any) -> None:
    result = scored("vqav2", {42000: "Red.", 42001: "two", 73000: "Yes"})
    # red: two people said it: (2 * 1/3 + 8 * 2/3) / 10 = 0.6. two: all. Yes: LLaVA's processor makes "yes".
    assert result["headline"]["value"] == pytest.approx(100 * (0.6 + 1 + 1) / 3)
    # As it is, "Yes" is no "yes": nothing is normalised where people agree.
    assert result["metrics"]["accuracy_unprocessed"] == pytest.approx(100 * (0.6 + 1) / 3)
    assert result["categories"]["answer type"]["other"] == {"value": pytest.approx(60), "questions": 1}
    assert not result["partial"]
    assert result["version"]["same"] is False
    assert "214354" in " ".join(result["notes"])
    question = asked("vqav2")["42000"]
    assert question.prompt == f"What color?\n{SHORT}"
    assert question.images[0].name == "COCO_val2014_000000000042.jpg"


def test_vqav2_for_the_server(data: Any, tmp_path: Path, scored: Any) -> None:
    rows = [{"image_id": 1, "question": "What?", "question_id": n} for n in (1, 2, 3)]
    data.json("v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": rows[:2]})
    data.json("v2_OpenEnded_mscoco_test2015_questions.json", {"questions": rows})
    task = get_task("vqav2", "test-dev")
    questions = read_questions(task, data.path).questions
    answered = [Answered(question, "The Dog.") for question in questions]
    task.submission(answered, tmp_path / "upload.json", data.path)
    assert json.loads((tmp_path / "upload.json").read_text()) == [
        {"question_id": 1, "answer": "dog"},
        {"question_id": 2, "answer": "dog"},
        {"question_id": 3, "answer": ""},
    ]
    with pytest.raises(InputError, match="not public"):
        task.score(answered)


def test_vqav2_files_of_two_versions(vqav2: Any, scored: Any) -> None:
    vqav2.json(
        "v2_mscoco_val2014_annotations.json", {"annotations": [{"question_id": 1, "answers": people("a")}]}
    )
    with pytest.raises(InputError, match=r"42000 .* has no annotation"):
        scored("vqav2", {42000: "red"})


def test_gqa(data: Any, scored: Any, asked: Any, tmp_path: Path) -> None:
    questions = {
        "201": {
            "imageId": "n1",
            "question": "Is it red?",
            "answer": "yes",
            "types": {"structural": "verify"},
        },
        "202": {
            "imageId": "n1",
            "question": "What is it?",
            "answer": "dog",
            "types": {"structural": "query"},
        },
        "203": {"imageId": "n2", "question": "Which?", "answer": "left", "types": {"structural": "choose"}},
    }
    data.json("questions1.2/testdev_balanced_questions.json", questions)
    # "Yes." becomes "yes"; "the dog" is not "dog"; "left..." loses all its periods.
    result = scored("gqa", [{"question_id": k, "text": t} for k, t in (("201", "Yes."), ("202", "the dog"),
                                                                      ("203", "Left..."))])  # fmt: skip
    assert result["headline"]["value"] == pytest.approx(200 / 3)
    assert result["categories"]["answer"]["binary"]["value"] == 100
    assert result["categories"]["answer"]["open"] == {"value": 0, "questions": 1}
    assert asked("gqa")["201"].images[0].name == "n1.jpg"


def test_gqa_by_llavas_list_is_for_a_submission(data: Any, scored: Any) -> None:
    data.lines(
        "llava_gqa_testdev_balanced.jsonl", [{"question_id": "1", "image": "n1.jpg", "text": "Is it?"}]
    )
    with pytest.raises(InputError, match="holds no answers"):
        scored("gqa", {"1": "yes"})


def test_vizwiz(data: Any, scored: Any, asked: Any) -> None:
    rows = [
        {"image": "VizWiz_val_00000000.jpg", "question": "What?", "answer_type": "unanswerable",
         "answers": people(*["unanswerable"] * 6, *["can"] * 4)},
        {"image": "VizWiz_val_00000001.jpg", "question": "Color?", "answer_type": "other",
         "answers": people(*["The red"] * 10)},
    ]  # fmt: skip
    data.json("val.json", rows)
    result = scored(
        "vizwiz", {"VizWiz_val_00000000.jpg": "Unanswerable", "VizWiz_val_00000001.jpg": "the red"}
    )
    # The scorer never normalises people's answers: "The red" is out of reach of any prediction.
    assert result["headline"]["value"] == pytest.approx(50)
    data.lines(
        "llava_val.jsonl", [{"question_id": 70 + n, "image": row["image"]} for n, row in enumerate(rows)]
    )
    llava = [{"question_id": 70, "text": "Unanswerable"}, {"question_id": 71, "text": "the red"}]
    assert scored("vizwiz", llava)["headline"] == result["headline"]
    assert result["metrics"]["accuracy_answers_processed"] == pytest.approx(100)
    assert "respond with 'Unanswerable'." in asked("vizwiz")["VizWiz_val_00000000.jpg"].prompt


def test_textvqa(data: Any, scored: Any, asked: Any) -> None:
    rows = [
        {"image_id": "ab12", "question_id": 34602, "question": "What brand?", "answers": ["nokia"] * 10},
        {"image_id": "ab12", "question_id": 34603, "question": "What year?", "answers": ["1990."] * 10},
    ]
    data.json("TextVQA_0.5.1_val.json", {"data": rows})
    data.json(
        "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": [{"image_id": "ab12", "ocr_tokens": ["NOKIA", "7"]}]}
    )
    assert asked("textvqa")["34602"].prompt == f"What brand?\nReference OCR token: NOKIA, 7\n{SHORT}"
    # LLaVA's rows name the picture only; the prompt tells its questions apart.
    prompts = [f"{row['question']}\nReference OCR token: NOKIA, 7\n{SHORT}" for row in rows]
    result = scored("textvqa", [{"question_id": "ab12", "prompt": prompts[1], "text": "1990"},
                               {"question_id": "ab12", "prompt": prompts[0], "text": "Nokia."}])  # fmt: skip
    assert result["headline"]["value"] == pytest.approx(100)
    assert result["metrics"]["accuracy_corrected"] == pytest.approx(50)  # "1990." keeps its period there


POPE = {"adversarial": ("yes", "no"), "popular": ("yes", "no"), "random": ("no", "no")}


@pytest.fixture
def pope(data: Any) -> Any:
    for kind, labels in POPE.items():
        rows = [
            {
                "question_id": n,
                "image": f"COCO_val2014_{n:012d}.jpg",
                "text": f"Is there a {kind}?",
                "label": label,
            }
            for n, label in enumerate(labels, 1)
        ]
        data.lines(f"coco/coco_pope_{kind}.json", rows)
    return data


def test_pope(pope: Any, scored: Any) -> None:
    answers = {
        "adversarial/1": "Yes", "adversarial/2": "No, there is not.",  # right, right: F1 1
        "popular/1": "NO", "popular/2": "I see one. No",  # two yes (NO is none): 1 hit, 1 wrong: F1 2/3
        "random/1": "no", "random/2": "",  # the empty one is a yes: no hit: F1 0
    }  # fmt: skip
    result = scored("pope", answers)
    assert result["headline"]["value"] == pytest.approx(100 * (1 + 2 / 3 + 0) / 3)
    assert result["categories"]["f1"]["popular"]["value"] == pytest.approx(100 * 2 / 3)
    assert result["metrics"]["accuracy"] == pytest.approx(100 * (1 + 0.5 + 0.5) / 3)
    assert any("neither yes nor no" in note for note in result["notes"])
    rows = [
        {"question_id": int(key[-1]), "category": key[:-2], "text": text} for key, text in answers.items()
    ]
    assert scored("pope", rows)["headline"] == result["headline"]


def test_pope_where_all_say_no(pope: Any, scored: Any) -> None:
    result = scored("pope", {f"{kind}/{n}": "no" for kind in POPE for n in (1, 2)})
    assert result["headline"]["value"] == 0
    assert any("divides by zero" in note for note in result["notes"])


def test_pope_with_llavas_list_and_rows(pope: Any, scored: Any) -> None:
    listed = [
        {"question_id": 10 * k + n, "image": f"COCO_val2014_{n:012d}.jpg", "text": "?", "category": kind}
        for k, kind in enumerate(POPE)
        for n in (1, 2)
    ]
    pope.lines("llava_pope_test.jsonl", listed)
    rows = [{"question_id": row["question_id"], "prompt": "", "text": "Yes"} for row in listed]
    result = scored("pope", rows)
    # Always yes: precision 1/2, recall 1 twice, then nothing to find.
    assert result["headline"]["value"] == pytest.approx(100 * (2 / 3 + 2 / 3 + 0) / 3)
    pope.lines("llava_pope_test.jsonl", [listed[0] | {"image": "other.jpg"}, *listed[1:]])
    with pytest.raises(InputError, match=r"adversarial question 1 is about 'other.jpg'"):
        scored("pope", rows)
    pope.lines("llava_pope_test.jsonl", listed[1:])
    with pytest.raises(InputError, match=r"lists 1 adversarial question where .* has 2"):
        scored("pope", rows)


@pytest.fixture
def mme(data: Any) -> Any:
    root = "MME_Benchmark_release_version"
    end = " Please answer yes or no."
    data.text(f"{root}/existence/0001.txt", f"Is there a dog?{end}\tYes\nIs there a cat?{end}\tNo\n")
    data.text(f"{root}/existence/0002.txt", f"Is there a bus?{end}\tYes\nIs there a car?{end}\tNo\n")
    data.text(f"{root}/OCR/0001.txt", f"Is it A?{end}\tYes\nIs it B?{end}\tNo\n")
    data.text(f"{root}/code_reasoning/questions_answers_YN/7.txt", f"One?{end}\tYes\nTwo?{end}\tNo\n")
    (data.path / root / "code_reasoning" / "images").mkdir()
    return data


def test_mme(mme: Any, scored: Any, asked: Any) -> None:
    answers = {
        "existence/0001/1": "Yes", "existence/0001/2": "No.",  # both right
        "existence/0002/1": "It is yes", "existence/0002/2": "no",  # "it i" is neither: wrong, right
        "OCR/0001/1": "yes", "OCR/0001/2": "Not at all",  # "not " holds "no": both right
        "code_reasoning/7/1": "no", "code_reasoning/7/2": "no",
    }  # fmt: skip
    result = scored("mme", answers)
    # existence: 75 + 50 (one of two pictures); OCR: 100 + 100. code_reasoning is cognition: 50 + 0.
    assert result["headline"]["value"] == pytest.approx(125 + 200)
    assert result["metrics"]["cognition"] == pytest.approx(50)
    assert result["metrics"]["other"] == 1
    questions = asked("mme")
    assert questions["existence/0001/1"].prompt == f"Is there a dog?\n{SHORT}"
    assert questions["OCR/0001/1"].images[0].name == "OCR/0001.jpg"  # another picture than existence/0001.jpg
    (mme.path / "MME_Benchmark_release_version/code_reasoning/images/7.png").write_bytes(b"7")
    assert questions["code_reasoning/7/1"].images[0].source().name == "7.png"


def test_mme_by_llavas_rows(mme: Any, scored: Any) -> None:
    rows = [
        {"question_id": f"{name}.png", "prompt": f"{text}\n{SHORT}", "text": answer}
        for name, text, answer in (
            ("existence/0001", "Is there a cat?", "No"), ("existence/0001", "Is there a dog?", "Yes"),
            ("existence/0002", "Is there a bus?", "Yes"), ("existence/0002", "Is there a car?", "No"),
            ("OCR/0001", "Is it A?", "Yes"), ("OCR/0001", "Is it B?", "No"),
            ("code_reasoning/7", "One?", "Yes"), ("code_reasoning/7", "Two?", "No"),
        )
    ]  # fmt: skip
    assert scored("mme", rows)["headline"]["value"] == pytest.approx(400)


def test_mme_for_its_own_script(mme: Any, tmp_path: Path) -> None:
    task = get_task("mme")
    answered = [Answered(q, "yes\nor\tno") for q in read_questions(task, mme.path).questions]
    task.submission(answered, tmp_path / "out", mme.path)
    lines = (tmp_path / "out" / "OCR.txt").read_text().splitlines()
    assert lines[0] == "0001.txt\tIs it A? Please answer yes or no.\tYes\tyes or no"
