"""Your own questions in any format of rows: the first question of each, and its answer."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from pumice.chat_client import with_images
from pumice.conversation import StoredImage, Video
from pumice.errors import InputError
from pumice.evaluate.tasks import get_task
from pumice.messages import decode_data_url

ROWS = [
    {"id": "a", "image": "a.png", "question": "What is it?", "answer": "dog"},
    {"id": "b", "image": "b.png", "question": "And this?", "answer": "cat"},
]


def asked(data: Path) -> list[tuple[str, str, list[str], list[bytes | Path | Video]]]:
    questions = get_task("own").questions(data)
    return [(q.id, q.prompt, q.meta["answers"], [image.source() for image in q.images]) for q in questions]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"picture " + name.encode())
    return tmp_path


def test_messages_and_turns(pictures: Path) -> None:
    lines = []
    for r in ROWS:
        texts = {"user": f"<image>{r['question']}", "assistant": r["answer"]}
        messages = [{"role": role, "content": text} for role, text in texts.items()]
        lines.append(json.dumps({"id": r["id"], "images": [r["image"]], "messages": messages}) + "\n")
    (pictures / "rows.jsonl").write_text("".join(lines))
    expected = [(r["id"], r["question"], [r["answer"]], [pictures / r["image"]]) for r in ROWS]
    assert asked(pictures / "rows.jsonl") == asked(pictures / "r*.jsonl") == expected


def test_tables_with_pictures_inside(pictures: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    table = pandas.DataFrame(ROWS)
    table["image"] = [(pictures / name).read_bytes() for name in table["image"]]
    table["answers"] = [["dog", "a dog"], ["cat"]]
    table["metric"] = ["contains", None]
    (pictures / "set").mkdir()
    table.to_parquet(pictures / "set" / "test-0.parquet")
    assert asked(pictures / "set") == [
        ("a", "What is it?", ["dog", "a dog"], [b"picture a"]),
        ("b", "And this?", ["cat"], [b"picture b"]),
    ]
    metrics = [question.meta["metric"] for question in get_task("own").questions(pictures / "set")]
    assert metrics == ["contains", "exact"]


def test_videos_beside_pictures(pictures: Path) -> None:
    (pictures / "c.mp4").write_bytes(b"a film")
    answers = {"answers": ["dog"]}
    rows = [
        {"id": "0", "video": "c.mp4", "question": "<video> What?"} | answers,
        {"id": "1", "video": ["c.mp4"], "image": "a.png", "question": "Is <video> like <image>?"} | answers,
        {"id": "2", "videos": ["c.mp4"], "image": "a.png", "question": "Same?"} | answers,
        {"id": "3", "video": "gone.mp4", "question": "What?"} | answers,
    ]
    (pictures / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    clip = Video(pictures / "c.mp4")
    questions = list(get_task("own").questions(pictures))
    assert [(q.prompt, [image.source() for image in q.images]) for q in questions[:3]] == [
        ("What?", [clip]),
        ("Is <image> like <image>?", [clip, pictures / "a.png"]),
        ("Same?", [pictures / "a.png", clip]),
    ]
    assert "video 'gone.mp4' is not beside" in questions[3].images[0].problem()
    # Behind an address a video is a data URL, as vLLM takes it.
    [part, text] = with_images("What?", [clip])
    assert part["type"] == "video_url" and text == {"type": "text", "text": "What?"}
    assert decode_data_url(part["video_url"]["url"]) == b"a film"
    for row, words in (
        ({"video": "c.mp4", "image": "a.png", "question": "<image>?"}, "0 <video> for 1 video"),
        ({"video": 3, "question": "?"}, "'video' must be a path or a list of paths of videos"),
        ({"video": "c.mp4", "question": "?", "metric": "box"}, "needs one picture, found a video"),
        ({"video_file": "c.mp4", "question": "?"}, "did you mean 'video'"),
    ):
        (pictures / "questions.jsonl").write_text(json.dumps(row | answers) + "\n")
        with pytest.raises(InputError, match=words):
            list(get_task("own").questions(pictures))


def test_videos_of_rows_to_learn_from(pictures: Path) -> None:
    """A file of rows with turns, and one inside an archive."""
    (pictures / "c.mp4").write_bytes(b"a film")
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "dog"}]
    (pictures / "rows.json").write_text(json.dumps([{"video": "c.mp4", "conversations": turns}]))
    with tarfile.open(pictures / "rows.tar", "w") as archive:
        for name, data in (("0.json", json.dumps({"conversations": turns}).encode()), ("0.mp4", b"a film")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert asked(pictures / "rows.json") == [("1", "What?", ["dog"], [Video(pictures / "c.mp4")])]
    [(_, prompt, _, [video])] = asked(pictures / "rows.tar")
    assert prompt == "What?" and isinstance(video, Video)
    assert isinstance(video.file, StoredImage) and video.file.load() == b"a film"


def test_the_own_format_keeps_its_messages(pictures: Path) -> None:
    (pictures / "own.jsonl").write_text(json.dumps({"id": "a", "question": "?", "answers": {}}) + "\n")
    with pytest.raises(InputError, match="'answers' must be a text or a list of texts"):
        asked(pictures / "own.jsonl")


def test_a_file_of_the_own_format_may_have_rows_that_nothing_learns(pictures: Path) -> None:
    Image.new("RGB", (20, 20)).save(pictures / "a.png")
    box = {"id": "b", "image": "a.png", "question": "Where?", "answers": [[1, 2, 3, 4]], "metric": "box"}
    rows = [{"id": "a", "question": "What?", "answers": ["dog"]}, box]
    (pictures / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    questions = list(get_task("own").questions(pictures / "own.jsonl"))
    assert [question.meta["metric"] for question in questions] == ["exact", "box"]


def test_tables_and_other_columns(pictures: Path) -> None:
    expected = [(r["id"], r["question"], [r["answer"]], [pictures / r["image"]]) for r in ROWS]
    header = "id,image,question,answer\n"
    (pictures / "rows.csv").write_text(header + "".join(",".join(r.values()) + "\n" for r in ROWS))
    assert asked(pictures / "rows.csv") == expected
    renamed = [
        {"id": r["id"], "img": r["image"], "query": r["question"], "response": r["answer"]} for r in ROWS
    ]
    (pictures / "rows.jsonl").write_text("\n".join(map(json.dumps, renamed)))
    assert asked(pictures / "rows.jsonl") == expected
    voted = [r | {"answers": [{"answer": r["answer"]}]} for r in ROWS]
    (pictures / "rows.json").write_text(json.dumps({"data": voted}))
    assert asked(pictures / "rows.json") == expected


def test_the_choices_of_a_table(pictures: Path) -> None:
    (pictures / "rows.csv").write_text('question,answer,choices\nWhich?,B,"[""cat"", ""dog""]"\n')
    [question] = get_task("own").questions(pictures / "rows.csv")
    assert question.prompt == "Which?\nA. cat\nB. dog" and question.meta["metric"] == "option"


def test_of_several_questions_the_first_has_its_own_answer(pictures: Path) -> None:
    row = {"id": "a", "img": "a.png", "questions": ["What?", "Where?"], "answers": ["dog", "here"]}
    (pictures / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert asked(pictures / "rows.jsonl") == [("a", "What?", ["dog"], [pictures / "a.png"])]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"path": "a.png", "question": "?", "answer": "!"}, "'path' names a picture, and is not read as one"),
        ({"image": "a.png", "ask": "?", "reply": "!"}, "columns: {question: ask, answer: reply}"),
    ],
)
def test_rows_that_would_be_asked_wrongly(pictures: Path, row: dict[str, str], message: str) -> None:
    (pictures / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=re.escape(message)):
        asked(pictures / "rows.jsonl")
