"""Captions, CLEVR, CHAIR and your own file: official layouts made small, scores by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pumice.errors import InputError
from pumice.evaluate.result import read_questions
from pumice.evaluate.task import Answered
from pumice.evaluate.tasks import get_task, registry
from pumice.evaluate.tasks.hallucination import ObjectNames
from pumice.evaluate.tasks.own import METRICS, read_option


def test_every_task_says_where_its_files_come_from() -> None:
    assert list(registry())[:12] == [
        "vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mme", "mmbench", "mmbench-cn", "seed",
        "llava-bench", "mmvet",
    ]  # fmt: skip
    for task in registry().values():
        assert task.source.url and task.source.version and task.source.licence and task.source.files
    with pytest.raises(InputError, match="there is no task 'popes'"):
        get_task("popes")
    with pytest.raises(InputError, match="pope has no split 'val'"):
        get_task("pope", "val")


def test_no_benchmark_needs_torch() -> None:
    code = """
import sys
from pumice.evaluate import compare, report, run
from pumice.evaluate.tasks import registry
import pumice.cli
assert len(registry()) > 20
heavy = ("torch", "transformers", "pyarrow", "httpx", "pycocoevalcap")
print([name for name in heavy if name in sys.modules])
"""
    process = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    assert process.stdout == "[]\n"


@pytest.fixture(autouse=True)
def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pumice.evaluate.metrics.captions.shutil.which", lambda _: None)


def test_coco_captions_of_karpathys_file(data: Any, scored: Any, asked: Any, tmp_path: Path) -> None:
    texts = {391895: "A man rides a red motorcycle.", 522418: "A woman cuts a large cake."}
    images = [
        {"filepath": "val2014", "filename": f"COCO_val2014_{key:012d}.jpg", "cocoid": key, "imgid": n,
         "split": "test", "sentences": [{"raw": text}, {"raw": text}]}
        for n, (key, text) in enumerate(texts.items())
    ]  # fmt: skip
    train = {"filepath": "train2014", "filename": "x.jpg", "cocoid": 1, "split": "train", "sentences": []}
    data.json("dataset_coco.json", {"images": [*images, train], "dataset": "coco"})
    rows = [{"image_id": key, "caption": text} for key, text in texts.items()]
    result = scored("coco-caption", rows)
    # The people's own words: every metric is at its top, CIDEr-D at 10 per picture, written as 1000.
    assert result["headline"]["value"] == pytest.approx(1000)
    assert result["metrics"]["BLEU-4"] == pytest.approx(100)
    assert result["metrics"]["ROUGE-L"] == pytest.approx(100)
    assert any("METEOR is left out" in note for note in result["notes"])
    assert result["questions"] == 2
    task = get_task("coco-caption")
    answered = [Answered(q, "A\ncat ") for q in read_questions(task, data.path).questions]
    task.submission(answered, tmp_path / "captions.json", data.path)
    assert json.loads((tmp_path / "captions.json").read_text())[0] == {"image_id": 391895, "caption": "A cat"}


def test_flickr_is_known_by_file_name(data: Any, scored: Any) -> None:
    images = [{"filename": f"{n}.jpg", "imgid": n, "split": "test", "sentences": [{"raw": text}]}
              for n, text in enumerate(("A dog runs fast.", "Two cats sleep here."))]  # fmt: skip
    data.json("dataset_flickr8k.json", {"images": images})
    assert scored("flickr8k", {"0.jpg": "A dog runs fast.", "1.jpg": "no"})["headline"][
        "value"
    ] == pytest.approx(500)


def test_nocaps_by_domain(data: Any, scored: Any) -> None:
    images = [{"id": n, "file_name": f"{n}.jpg", "domain": domain} for n, domain in
              enumerate(("in-domain", "out-domain"))]  # fmt: skip
    notes = [{"image_id": 0, "caption": "a dog runs fast"}, {"image_id": 1, "caption": "a sushi roll here"}]
    data.json("nocaps_val_4500_captions.json", {"images": images, "annotations": notes})
    result = scored("nocaps", {0: "a dog runs fast", 1: "nothing"})
    assert result["categories"]["domain"]["in-domain"]["value"] == pytest.approx(1000)
    assert result["categories"]["domain"]["out-domain"]["value"] == 0


def test_clevr_by_kind_and_family(data: Any, scored: Any) -> None:
    functions = ["count", "equal_color", "query_size", "less_than"]
    answers = ["3", "yes", "large", "no"]
    rows = [
        {"question_index": n, "question": "?", "answer": answer, "image_filename": "CLEVR_val_000000.png",
         "question_family_index": n % 2, "program": [{"function": "scene"}, {"function": name}]}
        for n, (name, answer) in enumerate(zip(functions, answers, strict=True))
    ]  # fmt: skip
    data.json("questions/CLEVR_val_questions.json", {"questions": rows})
    result = scored("clevr", {0: "three", 1: "Yes.", 2: "small", 3: "no"})
    assert result["headline"]["value"] == 50
    assert result["metrics"]["accuracy_number_words"] == 75
    assert set(result["categories"]["kind"]) == {
        "count",
        "compare attribute",
        "query attribute",
        "compare integer",
    }
    assert result["categories"]["family"]["1"]["value"] == 100


SYNONYMS = (
    "person, man, woman, child\ndog, puppy\nsheep, lamb\ncat, kitten\nchair, seat\ntoilet\nbench\n"
    "hot dog\nwine glass\nknife\nbus\ntie\nboat, canoe\ntrain\nbird\nmotorcycle, scooter,  motor bike\n"
)


def test_easy_vqa_by_what_is_asked(data: Any, scored: Any, asked: Any) -> None:
    rows = [
        ["what color is the shape?", "teal", 0],
        ["what shape is in the image?", "circle", 0],
        ["is there a circle?", "yes", 0],
        ["is no teal shape present?", "no", 0],
        ["does the image not contain a red shape?", "yes", 1],
    ]
    data.json("easy_vqa/data/train/questions.json", rows[:1])
    data.json("easy_vqa/data/test/questions.json", rows)
    result = scored("easy-vqa", {0: "Teal.", 1: "a circle", 2: " Yes\n", 3: "yes", 4: "yes."})
    assert result["headline"]["value"] == pytest.approx(60)
    assert result["metrics"]["accuracy_colour_and_shape"] == pytest.approx(50)
    kinds = {name: cell["value"] for name, cell in result["categories"]["question"].items()}
    assert kinds == {"colour": 100, "shape": 0, "there": 100, "not there": 50}
    question = asked("easy-vqa")["4"]
    assert question.images[0].name == "1.png"
    assert question.prompt.startswith("does the image not contain a red shape?\n")
    data.json("easy_vqa/data/test/questions.json", [*rows, ["what?", "red"]])
    with pytest.raises(InputError, match="question 6: expected"):
        asked("easy-vqa")


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("Two men and three puppies", ["person", "dog"]),
        ("A hot dog, two hot dogs", ["hot dog", "hot dog"]),
        ("a baby sheep", ["sheep"]),
        ("A toilet seat", ["toilet"]),
        ("The dog's bench; benches", ["dog", "bench", "bench"]),
        ("wine glasses and knives", ["wine glass", "knife"]),
        ("nothing of the sort", []),
        ("two buses, a bus", ["bus"]),  # "bus" is taken for a plural
        ("A tie, ties, canoes; thieves", ["tie"]),
        ("A motor bike. Scooters", ["motorcycle"]),  # behind two spaces in the list
        ("Beside the train tracks, baby, bird", ["bird"]),
        ("women/men, a 'dog', **sheep**; hot-dog--cat's", ["dog", "sheep", "cat"]),
        ("the dog.the cat... A wine glass", ["cat", "wine glass"]),
    ],
)
def test_things_in_a_text(text: str, objects: list[str]) -> None:
    assert ObjectNames(SYNONYMS.splitlines()).find(text) == objects


def test_things_corrected() -> None:
    object_names = ObjectNames(SYNONYMS.splitlines(), corrected=True)
    caption = "A bus, ties, canoes, a motor bike, glasses, two skis, men"
    assert object_names.find(caption) == [
        "bus",
        "tie",
        "boat",
        "motorcycle",
        "person",
    ]


def test_chair(data: Any, scored: Any) -> None:
    data.text("synonyms.txt", SYNONYMS)
    data.json("annotations/instances_val2014.json", {
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in (1, 2)],
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
        "annotations": [{"image_id": 1, "category_id": 1}, {"image_id": 2, "category_id": 18}],
    })  # fmt: skip
    data.json(
        "annotations/captions_val2014.json",
        {"annotations": [{"image_id": 1, "caption": "A man on a bench."}]},
    )
    result = scored("chair", {1: "A woman and a cat on a bench, another cat.", 2: "A puppy."})
    # Named: person, cat, bench, cat, dog. Not there: cat, twice.
    assert result["headline"]["value"] == pytest.approx(100 * 2 / 5)
    assert result["metrics"]["CHAIRs"] == result["metrics"]["CHAIRs_corrected"] == 50
    assert result["metrics"]["recall"] == pytest.approx(100)
    assert result["categories"]["invented things"]["cat"]["questions"] == 2


def test_your_own_file(data: Any, scored: Any, asked: Any) -> None:
    rows = [
        {
            "id": "a",
            "image": "a.png",
            "question": "Color?",
            "answers": ["Red", "dark red"],
            "category": "color",
        },
        {"id": "b", "question": "Many?", "answer": 3, "metric": "vqa"},
        {"id": "c", "question": "Which?", "answers": "B", "choices": ["cat", "dog"]},
        {"id": "d", "question": "Is it?", "answers": "no", "metric": "yes_no"},
        {"id": "e", "question": "Say.", "answers": ["dog"], "metric": "contains"},
        {"id": "f", "question": "Describe.", "answers": ["a dog"], "metric": "rouge_l"},
    ]
    data.lines("questions.jsonl", rows)
    answers = {"a": "dark  red .", "b": "three", "c": "the dog", "d": "No.", "e": "hotdogs", "f": "a dog"}
    result = scored("own", answers)
    assert result["headline"]["value"] == pytest.approx(100 * 5 / 6)
    assert result["categories"]["metric"]["contains"]["value"] == 0
    assert result["version"]["same"] is None
    assert asked("own")["c"].prompt == "Which?\nA. cat\nB. dog"
    with pytest.raises(InputError, match=r"picture 'a.png' is not beside"):
        asked("own")["a"].images[0].source()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?"}, "'answers' is missing; write a text or a list of texts"),
        ({"question": "?", "answers": "x", "metric": "bleu"}, "there is no metric 'bleu'"),
        ({"question": "?", "answers": "x", "metric": ["exact"]}, r"there is no metric \['exact'\]"),
        ({"question": "?", "answers": "x", "metric": "option"}, "needs 'choices'"),
        ({"question": "?", "answers": "Maybe.", "metric": "yes_no"}, "are of yes, no, found \\['maybe'\\]"),
        ({"question": "?", "answers": "c", "choices": ["c", "d"]}, "are of A, B, found \\['c'\\]"),
        ({"answers": "x"}, "'question' is missing"),
        ({"question": "?", "answers": "x", "image": 3}, "'image' must be a path"),
        ({"question": "?", "answers": "x", "images": ["a.png"]}, "did you mean 'image'"),
        (
            {"question": "?", "answers": "x", "audio": "a.wav"},
            "'audio' cannot be used, only pictures and vid",
        ),
    ],
)
def test_your_own_file_with_a_mistake(data: Any, scored: Any, row: dict[str, Any], message: str) -> None:
    data.lines("questions.jsonl", [row])
    with pytest.raises(InputError, match=message):
        scored("own", {1: "x"})


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("b", "B"), ("(B)", "B"), ("Option b.", "B"), ("Answer: $B", "B"), ("\\boxed{B}", "B"),
        ("选项B", "B"),
        ("答案是B。", "B"), ("B) a dog", "B"), ("The answer is B, not A.", "B"), ("It runs.", None),
        ("The correct answer is B. Here's why: a dog is shown in the picture, and it runs.", "B"),
        ("<think>A? No.</think>B", "B"), ("The answer is B. No, the answer is A.", None), ("a dog", "B"),
        ("A dog.", "B"), ("A bird flies over the house.", None), ("A is right", "A"), ("A", "A"),
        ("答案\uff1a\uff22", "B"), ("我选\uff22", "B"), ("答えはBです", "B"), ("정답은 B입니다", "B"),
        ("ans: b", "B"), ("b) a dog", "B"), ("B\n\nA shows none.", "B"),
        ("B is the correct answer, as A is none.", "B"),
        ("", None), ("It is (b).", "B"), ("dog(s)", None),
        # What an answer denies is not read.
        ("Not A", None), ("not (A).", None), ("Neither A nor B.", None), ("It is not A, but B.", "B"),
        ("not A, B, or C", None), ("The answer is not option A", None), ("It can't be A", None),
        ("A is wrong", None), ("A isn't right, B is", "B"), ("B rather than A", "B"), ("不是A", None),
        ("不是 A", None), ("This is not a dog.", None), ("It does not show a dog", None),
        ("a dog, not a cat", "B"), ("Not sure, maybe A", "A"), ("I cannot see: A", "A"),
        ("It isn't B; the right one is: A", "A"), ("<think>not</think>A", "A"),
    ],
)  # fmt: skip
def test_which_option_an_answer_to_your_own_file_means(answer: str, letter: str | None) -> None:
    assert read_option(answer, {"A": "a cat", "B": "a dog", "C": "None"}) == letter


@pytest.mark.parametrize(
    ("answer", "letter"), [("Not visible.", "B"), ("visible", "A"), ("D", "D"), ("neither A nor B", "D")]
)
def test_an_answer_that_repeats_an_option(answer: str, letter: str) -> None:
    """Such as an option that holds another's text, or denies one."""
    choices = {"A": "Visible", "B": "Not visible", "C": "D", "D": "Neither A nor B."}
    assert read_option(answer, choices) == letter


def test_an_option_without_text_is_not_found_in_every_answer() -> None:
    choices = {"A": "0", "B": "1", "C": ""}
    assert [read_option(answer, choices) for answer in ("nothing", "1", "C")] == [None, "B", "C"]


@pytest.mark.usefixtures("bounded_work")
def test_long_answers_to_your_own_file_are_read_in_time() -> None:
    blanks = " " * 100_000
    for answer, letter in (
        (f"answer{blanks}!", None), (f"The answer is{blanks}B", "B"), (f"not{blanks}A", None),
        (f"A{blanks}is{blanks}wrong", None), (f"not A{blanks}, but B", "B"), ("<think>" * 100_000, None),
        ("<think>A</think>" * 10_000 + "B", "B"), (f"({blanks}b)", "B"),
    ):  # fmt: skip
        assert read_option(answer, {"A": "a cat", "B": "a dog", "C": "None"}) == letter
    assert METRICS["contains"]("개" + "이나" * 50_000 + "구", {"answers": ["개"]}) == 0


def test_unread_answers_to_your_own_file_are_told(data: Any, scored: Any) -> None:
    rows: list[dict[str, Any]] = [
        {"id": n, "question": "?", "choices": ["x1", "y1"], "answers": ["A"]} for n in "ab"
    ]
    rows += [{"id": n, "question": "?", "answers": ["yes"], "metric": "yes_no"} for n in "cd"]
    data.lines("questions.jsonl", rows)
    result = scored("own", {"a": "A", "b": "Not A", "c": "Yes.", "d": "unsure"})
    assert result["metrics"]["unread"] == 2
    assert result["notes"] == [
        "1 answer names no option, which counts as wrong",
        "1 answer says neither yes nor no, which counts as yes",
    ]


@pytest.mark.parametrize("metric", ["contains", "vqa", "exact"])
@pytest.mark.parametrize(("answer", "value"), [("", 0), ("!", 0), ("B", 0), ("A", 100), ("a.", 100)])
def test_an_answer_that_is_an_article(data: Any, scored: Any, metric: str, answer: str, value: float) -> None:
    """M4C drops articles: nothing would be left of the right answer, and be found in every empty one."""
    data.lines("questions.jsonl", [{"id": "1", "question": "?", "answers": ["A"], "metric": metric}])
    assert scored("own", {"1": answer})["headline"]["value"] == value


@pytest.mark.parametrize(
    ("metric", "answer", "truth", "value"),
    [
        ("contains", "图片里有一只猫。", "猫", 100), ("contains", "图片里有一只猫。", "一只猫", 100),
        ("contains", "图片里有一只猫。", "狗", 0), ("contains", "有13只猫", "3只", 0),
        ("contains", "有3只猫", "3只", 100),
        ("contains", "이것은 고양이입니다.", "고양이", 100), ("contains", "조개가 있다", "개", 0),
        ("contains", "개구리가 있습니다.", "개", 0), ("contains", "개들이었습니다.", "개", 100),
        ("contains", "공원에서는 논다", "공원", 100), ("contains", "빨간색 차예요", "빨간색 차", 100),
        ("contains", "แมวดำตัวหนึ่ง", "แมว", 100), ("contains", "a catalogue", "cat", 0),
        ("contains", "មានឆ្កែមួយក្នុងរូបភាព", "ឆ្កែ", 100), ("contains", "犬が写っています。", "犬", 100),
        ("contains", "བོད་ཡིག་ཡིན", "ཡིག", 100), ("contains", "ꦄꦏꦄ", "ꦏ", 100),
        ("contains", "カ\u3099ラスです", "ガラス", 100), ("contains", "有3只猫", "\uff13只", 100),
        ("contains", "le Cafe\u0301", "café", 100), ("exact", "Cafe\u0301.", "café", 100),
        ("exact", "猫。", "猫", 100), ("exact", "10²", "102", 0), ("exact", "10² m.", "\uff110² m", 100),
        ("contains", "10² m", "102", 0), ("contains", "about 10² m", "10²", 100),
        ("rouge_l", "一只猫", "一只猫", 100), ("rouge_l", "一只猫", "两条狗", 0),
    ],
)  # fmt: skip
def test_languages_without_spaces(
    data: Any, scored: Any, metric: str, answer: str, truth: str, value: float
) -> None:
    data.lines("questions.jsonl", [{"id": "1", "question": "?", "answers": [truth], "metric": metric}])
    assert scored("own", {"1": answer})["headline"]["value"] == value
