"""`pumice ask --batch`: rows are read, answered in order, and told where they are wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pumice.assistant import Assistant, load
from pumice.conversation import Video

SHORT = ["--max-new-tokens", "8"]


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))


def test_batch(run: Any, folder: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = folder / "inside"
    inside.mkdir()
    (folder / "cat.png").rename(inside / "cat.png")
    rows = [
        {"id": "beside", "image": "cat.png", "question": "What?"},
        {"id": "here", "image": "a dog.png", "question": "What?"},
        {"id": "missing", "image": "no.png", "question": "What?"},
        {"id": 7, "image": ["cat.png", "a dog.png"], "question": "<image> or <image>?"},
        "{broken",
        "",
        "[1]",
        '{"id": "text", "question": "Who are\u2028you?"}',
        {"id": "silent"},
        {"id": "odd", "image": 3, "question": "What?"},
        {"id": "empty", "question": " "},
        {"id": "placeholders", "image": "cat.png", "question": "<image><image>"},
        {"question": "No id?"},
        {"id": "typo", "image_path": "cat.png", "question": "What?"},
    ]
    write_rows(inside / "in.jsonl", rows)
    result = run("ask", "--batch", "inside/in.jsonl", "--out", "out.jsonl", "--slots", "2", *SHORT)
    assert (result.exit_code, result.stdout) == (0, "")
    first, *_, last, end = result.stderr.splitlines()  # off a terminal: a line every some seconds
    assert (first, last) == ("1 of 8 answers", "8 of 8 answers")
    assert end.startswith(
        "pumice: 8 of 13 rows have an error instead of an answer, the first with the id 'missing': "
    )
    assert "'no.png' does not exist" in end
    answers = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    ids = ["beside", "here", "missing", 7, 5, 7, "text", "silent", "odd", "empty", "placeholders", 13, "typo"]
    assert [a["id"] for a in answers] == ids
    assert [set(a) - {"id"} for a in answers] == [
        {"error" if i in (2, 4, 5, 7, 8, 9, 10, 12) else "answer"} for i in range(13)
    ]
    for number, message in {
        2: "'no.png' does not exist",
        4: "line 5 is not JSON (a key in double quotes is missing)",
        10: "2 <image>",
        12: "line 14: the key 'image_path' is not read; did you mean 'image'?",
    }.items():
        assert message in answers[number]["error"]
    alone = load(tiny_folder, device="cpu").ask(None, "Who are\u2028you?", max_new_tokens=8)
    assert answers[6]["answer"] == alone
    assert sorted(p.name for p in folder.iterdir()) == ["a dog.png", "inside", "out.jsonl"]


def test_keys_that_a_batch_does_not_read(run: Any, folder: Path) -> None:
    """One that may name a video is refused as for a picture; others are told once. So is asking anew."""
    rows = [
        {"id": 0, "vidio": "clip.gif", "question": "What?"},
        {"id": 1, "image": "cat.png", "images ": "a dog.png", "label": "cat", "question": "What?"},
        {"id": 2, "label": "dog", "question": "What?"},
    ]
    write_rows(folder / "in.jsonl", rows)
    command = ("ask", "--batch", "in.jsonl", "--out", "out.jsonl", *SHORT)
    keys, *rest = run(*command).stderr.splitlines()
    assert keys == (
        "pumice: 'in.jsonl' has keys that are not read: 'images ' (did you mean 'image'?), 'label'"
    )
    assert not any("anew" in line for line in rest)
    answers = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert answers[0]["error"] == "line 1: the key 'vidio' is not read; did you mean 'video'?"
    assert answers[1].keys() == answers[2].keys() == {"id", "answer"}
    assert "pumice: all rows are asked anew, and then 'out.jsonl' is replaced\n" in run(*command).stderr


def test_a_batch_may_be_a_json_list(run: Any, folder: Path) -> None:
    rows = [{"image": "cat.png", "question": "What?"}, {"question": "Who are\u2028you?"}, 3]
    (folder / "in.json").write_text(json.dumps(rows, indent=1))
    write_rows(folder / "in.jsonl", rows[:2])
    assert run("ask", "--batch", "in.json", "--out", "list.jsonl", *SHORT).exit_code == 0
    assert run("ask", "--batch", "in.jsonl", "--out", "lines.jsonl", *SHORT).exit_code == 0
    listed, lines = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("list.jsonl", "lines.jsonl")
    )
    assert listed[:2] == lines and {row["id"] for row in lines} == {1, 2}
    assert listed[2] == {"id": 3, "error": "row 3 is not an object with 'id' and 'question'"}


def test_a_damaged_list_is_no_batch(run: Any, refused: Any, folder: Path) -> None:
    """Its lines would be read one by one, and the last, which no comma follows, would be answered."""
    (folder / "in.json").write_text('[\n{"question": "What?"},\n{"question": "Who?"}\n')
    message = "the JSON list in 'in.json' is malformed or cut off (line 4, column 1: it ends too early)"
    refused(run("ask", "--batch", "in.json", "--out", "out.jsonl", *SHORT), message)
    assert not (folder / "out.jsonl").exists()


@pytest.mark.parametrize("indent", [None, 1])
def test_rows_inside_an_object_are_told(run: Any, refused: Any, folder: Path, indent: int | None) -> None:
    (folder / "in.json").write_text(
        json.dumps({"version": 1, "data": [{"question": "What?"}]}, indent=indent)
    )
    message = "'in.json' is one JSON object, with rows in its 'data'; write a JSON list of rows, or one row"
    refused(run("ask", "--batch", "in.json", "--out", "out.jsonl", *SHORT), message)


def test_a_list_of_a_batch_is_parsed_once(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "in.json").write_text('[{"id": "once", "image": "no.png", "question": "What?"}]')
    parsed, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda text, **how: parsed.append(str(text)) or loads(text, **how))
    run("ask", "--batch", "in.json", "--out", "out.jsonl")
    assert sum("once" in text for text in parsed) == 1


def test_videos_in_a_batch(run: Any, folder: Path, clip: str, tiny_folder: Path) -> None:
    """Beside pictures, where they are marked; --frames holds for each."""
    rows = [
        {"id": 0, "video": "clip.gif", "question": "What?"},
        {"id": 1, "video": "clip.gif", "question": "<video> What?"},
        {"id": 2, "video": ["clip.gif"], "image": "cat.png", "question": "<video> or <image>?"},
        {"id": 3, "image": "clip.gif", "question": "What?"},  # its first frame
        {"id": 6, "videos": ["clip.gif"], "question": "What?"},
        {"id": 4, "video": "no.mp4", "question": "What?"},
        {"id": 5, "video": "cat.png", "image": "cat.png", "question": "<image>?"},
        {"id": 7, "video": [""], "question": "What?"},
        {"id": 8, "video_path": "clip.gif", "question": "What?"},
        {"id": 9, "image": "x" * 300, "question": "What?"},
        {"id": 10, "video": "x" * 300, "question": "What?"},
    ]
    write_rows(folder / "in.jsonl", rows)
    command = ("ask", "--batch", "in.jsonl", "--out", "out.jsonl", *SHORT)
    assert run(*command, "--frames", "2").exit_code == 0
    answers = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assistant = load(tiny_folder, device="cpu")
    video = Video(folder / clip, 2)
    expected = [
        assistant.ask(video, "What?", max_new_tokens=8),
        assistant.ask(video, "What?", max_new_tokens=8),
        assistant.ask([video, folder / "cat.png"], "<image> or <image>?", max_new_tokens=8),
        assistant.ask(folder / "clip.gif", "What?", max_new_tokens=8),
        assistant.ask(video, "What?", max_new_tokens=8),
    ]
    assert [answer["answer"] for answer in answers[:5]] == expected
    for answer, words in zip(answers[5:], (
        "there is no video no.mp4", "0 <video> for 1 video",
        "'video' must be a path or a list of paths", "did you mean 'video'?", "File name too long",
        "there is no video xxx",
    ), strict=True):  # fmt: skip
        assert words in answer["error"]


def test_a_batch_without_a_single_answer_has_failed(run: Any, folder: Path) -> None:
    write_rows(folder / "in.jsonl", [{"id": 1, "image": "no.png", "question": "What?"}])
    result = run("ask", "--batch", "in.jsonl", "--out", "out.jsonl")
    assert (result.exit_code, (folder / "out.jsonl").exists()) == (1, True)


def test_batch_with_json(run: Any, folder: Path) -> None:
    write_rows(folder / "in.jsonl", [{"id": 1, "question": "What?"}, {"id": 2}])
    result = run("ask", "--batch", "in.jsonl", "--out", "out.jsonl", "--json", *SHORT)
    counts = json.loads(result.stdout)
    assert (counts["rows"], counts["answered"], counts["errors"], counts["out"]) == (2, 1, 1, "out.jsonl")
    assert result.stderr == "1 of 1 answer\n"


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("no/out.jsonl", "'no' of --out does not exist"),
        ("in.jsonl", "name another file"),
        (".", "name another"),
    ],
)
def test_batch_with_nowhere_to_write(run: Any, refused: Any, folder: Path, out: str, message: str) -> None:
    write_rows(folder / "in.jsonl", [{"id": 1, "question": "What?"}])
    refused(run("ask", "--batch", "in.jsonl", "--out", out), message)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_a_batch_that_was_stopped_goes_on(
    run: Any, refused: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    ask_each, asked = Assistant.ask_each, list[list[Any]]()

    def fail(*_: Any, **__: Any) -> Iterator[str]:
        yield "an answer from before"
        raise failure

    def count(self: Assistant, rows: Any, **more: Any) -> Iterator[Any]:
        asked.append(list(rows))
        return ask_each(self, asked[-1], **more)

    monkeypatch.setattr(Assistant, "ask_each", fail)
    rows = [{"id": "broken", "image": 3}, *({"id": n, "question": f"What is {n}?"} for n in range(3))]
    write_rows(folder / "in.jsonl", rows)
    (folder / "out.jsonl").write_text("old\n")
    command = ("ask", "--batch", "in.jsonl", "--out", "out.jsonl", *SHORT)
    assert run(*command).exit_code == (130 if failure is KeyboardInterrupt else 1)
    assert (folder / "out.jsonl").read_text() == "old\n"  # until there is something whole to replace it
    refused(run(*command, "--temperature", "1"), "ask as before, name another file or remove it")
    monkeypatch.setattr(Assistant, "ask_each", count)
    result = run(*command)
    assert (result.exit_code, asked) == (0, [[([], "What is 1?"), ([], "What is 2?")]])
    assert "1 of 3 answers is in 'out.jsonl.partial' already" in result.stderr
    answers = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [a["id"] for a in answers] == ["broken", 0, 1, 2]
    assert answers[1]["answer"] == "an answer from before"
    assert sorted(p.name for p in folder.iterdir()) == ["a dog.png", "cat.png", "in.jsonl", "out.jsonl"]
