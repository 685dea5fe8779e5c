"""projects/pumice-tiny/measure.py: numbers by hand from given answers, and a run on a real small model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from pumice.errors import InputError

CAPTIONS = {"dog": ["a brown dog runs"], "cat": ["two cats sleep on grass"], "man": ["the man rides a bike"]}


@pytest.fixture(scope="module")
def measure(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("measure")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three photographs of two sizes, their captions, and each asked about a dog."""
    (tmp_path / "val").mkdir()
    for number, name in enumerate(CAPTIONS):
        Image.new("RGB", (32, 24 + 8 * (number == 2)), (90 * number, 80, 70)).save(tmp_path / f"{name}.png")
    captions = [{"image": f"{name}.png", "captions": texts} for name, texts in CAPTIONS.items()]
    (tmp_path / "val" / "captions.json").write_text(json.dumps(captions))
    questions = [
        {
            "id": f"q{number}",
            "image": f"{name}.png",
            "question": "Is there a dog in the image?",
            "answer": "yes" if name == "dog" else "no",
            "kind": "yes" if name == "dog" else "hard",
        }
        for number, name in enumerate(CAPTIONS)
    ]
    (tmp_path / "val" / "presence.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return tmp_path


class Knowing:
    """Captions every photograph perfectly and finds dogs; sees nothing in a grey picture."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, str]] = []

    def ask_each(self, asks: Any, **options: Any) -> Iterator[str]:
        for image, question in asks:
            self.asked.append((image, question))
            name = image.stem if isinstance(image, Path) else "nothing"
            if question.startswith("Is there"):
                yield "Yes." if name == "dog" else "No, there is no dog."
            else:
                yield CAPTIONS.get(name, ["a grey wall"])[0]


def test_numbers_by_hand(measure: ModuleType, photos: Path) -> None:
    assistant = Knowing()
    result, _ = measure.measure(assistant, measure.read_held_out(photos / "val"), photos)
    for prompt in measure.PROMPTS:
        assert result["photographs"]["captions"][prompt]["cider"] == pytest.approx(10)
        assert result["grey"]["captions"][prompt]["cider"] < 1
    assert result["photographs"]["presence"]["accuracy"] == 1
    assert result["grey"]["presence"]["accuracy"] == pytest.approx(2 / 3)
    assert result["grey"]["presence"]["kinds"] == {"yes": 0, "hard": 1}
    assert not result["partial"]
    text = measure.table(result)
    assert "3 photographs, 3 yes/no questions\n" in text
    assert "| presence, accuracy | 100.0 | 100.0–100.0 | 66.7 |" in text


def test_a_picture_is_asked_about_together_and_grey_once_per_size(measure: ModuleType, photos: Path) -> None:
    assistant = Knowing()
    measure.measure(assistant, measure.read_held_out(photos / "val"), photos)
    each = len(measure.PROMPTS) + 1
    images = [image for image, _ in assistant.asked]
    assert images[: 3 * each] == [photos / f"{name}.png" for name in CAPTIONS for _ in range(each)]
    assert [image.size for image in images[3 * each :]] == [(32, 24)] * each + [(32, 32)] * each


def test_a_limit_is_marked(measure: ModuleType, photos: Path) -> None:
    held = measure.read_held_out(photos / "val", 2)
    result, _ = measure.measure(Knowing(), held, photos, grey=False)
    assert (result["pictures"], result["questions"], result["partial"]) == (2, 2, True)
    assert "PARTIAL" in measure.table(result)


def test_runs_on_a_model(measure: ModuleType, photos: Path, tiny_folder: Path, capsys: Any) -> None:
    numbers, answers = photos / "numbers.json", photos / "answers.jsonl"
    arguments = ["--model", str(tiny_folder), "--rows", str(photos / "val"), "--photos", str(photos)]
    written = ["--json", str(numbers), "--answers", str(answers)]
    assert measure.main([*arguments, *written]) == 0
    result = json.loads(numbers.read_text())
    assert set(result["photographs"]["captions"]) == set(measure.PROMPTS)
    assert result["grey"]["presence"]["questions"] == 3
    assert len(answers.read_text().splitlines()) == 3 * len(measure.PROMPTS) + 3
    assert "| presence, accuracy |" in capsys.readouterr().out


def test_easy_vqa_is_asked_by_the_same_command(measure: ModuleType, photos: Path) -> None:
    (photos / "test" / "images").mkdir(parents=True)
    (photos / "test" / "questions.json").write_text('[["is there a circle?", "no", 0]]')
    with pytest.raises(InputError, match="1 of 1 picture is missing"):
        measure.read_easy_vqa(photos)
    Image.new("RGB", (32, 32)).save(photos / "test" / "images" / "0.png")
    result = measure.easy_vqa(Knowing(), measure.read_easy_vqa(photos), "m")
    assert (result["headline"]["value"], result["answered"], result["partial"]) == (0, 1, False)


def test_wrong_input_is_one_sentence(measure: ModuleType, photos: Path, capsys: Any) -> None:
    arguments = ["--rows", str(photos / "absent"), "--photos", str(photos)]
    assert measure.main(arguments) == 2
    assert "captions.json; give the val folder that build.py wrote" in capsys.readouterr().err
    assert measure.main([*arguments, "--json", str(photos / "absent" / "x.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    with pytest.raises(InputError, match="--limit is 0"):
        measure.read_held_out(photos / "val", 0)
    (photos / "val" / "presence.jsonl").write_text('{"image": ')
    with pytest.raises(InputError, match="damaged"):
        measure.read_held_out(photos / "val")


class Talking(Knowing):
    """Knows COCO's animals too, and says the same twice of a cat."""

    def ask_each(self, asks: Any, **options: Any) -> Iterator[str]:
        for image, question in asks:
            self.asked.append((image, question))
            if question.startswith("How many"):
                yield "Two." if isinstance(image, Path) else "1"
            else:
                yield from super().ask_each([(image, question)])

    def stream(self, messages: list[dict[str, Any]], **options: Any) -> Iterator[str]:
        name = messages[0]["content"][0]["image"].stem
        yield from ("a ", name) if len(messages) == 1 or name == "cat" else ("brown",)


def test_vqa_by_type_and_second_answers(
    measure: ModuleType, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    val = photos / "val"
    for name in ("captions.json", "presence.jsonl"):
        (val / f"coco_{name}").write_bytes((val / name).read_bytes())
    vqa = [
        {
            "image": "dog.png",
            "question": "How many?",
            "answers": ["2"] * 7 + ["3"] * 3,
            "answer_type": "number",
        },
        {"image": "cat.png", "question": "What is it?", "answers": ["cat"] * 10, "answer_type": "other"},
    ]
    (val / "vqa_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in vqa))
    for name, rows in {
        "conversations": [
            {"image": f"{n}.png", "questions": ["What is it?", "Its colour?"]} for n in CAPTIONS
        ],
        "questions": [{"image": "dog.png", "question": "Is there a dog?", "right": ["yes"]}],
    }.items():
        (photos / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(measure, "HERE", photos)
    monkeypatch.setattr(measure.pumice, "load", lambda *_, **__: Talking())
    numbers, answers = photos / "numbers.json", photos / "answers.jsonl"
    written = ["--json", str(numbers), "--answers", str(answers)]
    assert measure.main(["--rows", str(val), "--photos", str(photos), *written]) == 0
    result = json.loads(numbers.read_text())
    photo_vqa = result["coco"]["photographs"]["vqa"]
    assert photo_vqa["number"]["accuracy"] == pytest.approx(1)  # "Two." is 2, which seven people said
    assert photo_vqa["other"]["accuracy"] == 0 and photo_vqa["all"] == {
        **photo_vqa["all"],
        "accuracy": 0.5,
        "questions": 2,
    }
    assert result["coco"]["grey"]["vqa"]["number"]["accuracy"] == 0
    assert (result["conversations"], result["repeated"]) == (3, 1)
    last = json.loads(answers.read_text().splitlines()[-1])
    assert (last["said"], last["right"]) == ("Yes.", ["yes"])
    output = capsys.readouterr().out
    assert "| VQA v2, number (1) | 100.0 |" in output and "1 of 3 second answers repeat the first" in output
