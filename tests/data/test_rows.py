"""Reading rows, finding their pictures, and refusing what is malformed."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pumice.data.rows import ImageFinder, Row, Rows
from pumice.errors import InputError

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dög \U0001f415."}]


def row(number: int, **more: Any) -> dict[str, Any]:
    return {"id": f"r{number}", "image": f"{number}.jpg", "conversations": TURNS, **more}


def write(path: Path, rows: list[Any], **style: Any) -> Rows:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r, **style) + "\n" for r in rows), "utf-8")
    else:
        path.write_text(json.dumps(rows, **style), "utf-8")
    return Rows(path)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_rows_of_both_formats(tmp_path: Path, name: str, ascii_only: bool) -> None:
    rows = write(tmp_path / name, [row(n) for n in range(5)], ensure_ascii=ascii_only)
    assert len(rows) == 5
    turns = tuple((t["from"], t["value"]) for t in TURNS)
    assert rows[3] == Row("r3", ("3.jpg",), turns, source="a")
    assert rows[-1].id == "r4" and [r.id for r in rows[1:3]] == ["r1", "r2"]
    assert [r.id for r in rows] == ["r0", "r1", "r2", "r3", "r4"]
    with pytest.raises(IndexError):
        rows[5]


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(), min_size=1, max_size=6),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
    lead=st.sampled_from(["", "\ufeff", " \n\t", "\ufeff\n"]),
)
def test_any_text_survives(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    indent: int | None,
    ascii_only: bool,
    lead: str,
) -> None:
    values = [row(n, conversations=[TURNS[0], {"from": "gpt", "value": t}]) for n, t in enumerate(texts)]
    listed, lined = (tmp_path_factory.getbasetemp() / n for n in ("any.json", "any.jsonl"))
    listed.write_bytes((lead + json.dumps(values, indent=indent, ensure_ascii=ascii_only) + " \n").encode())
    lines = [json.dumps(v, ensure_ascii=ascii_only) for v in values]
    lined.write_bytes((lead + "\r\n\n".join(lines)).encode())
    for path in (listed, lined):
        assert [r.turns[1][1] for r in Rows(path)] == texts


def test_contents_tell_the_format_not_the_name(tmp_path: Path) -> None:
    (tmp_path / "lines.json").write_text("\n" + json.dumps(row(1)) + "\n" + json.dumps(row(2)))
    assert [r.id for r in Rows(tmp_path / "lines.json")] == ["r1", "r2"]
    (tmp_path / "list.jsonl").write_text(json.dumps([row(1), row(2)]))
    assert [r.id for r in Rows(tmp_path / "list.jsonl")] == ["r1", "r2"]


def test_optional_fields(tmp_path: Path) -> None:
    values = [row(0, id=17.0), row(1, image=["a.png", "b.png"]), row(2, image=None), row(3)]
    del values[3]["image"], values[3]["id"]
    rows = Rows(write(tmp_path / "a.jsonl", values).path, source="mine")
    assert [r.id for r in rows] == ["17", "r1", "r2", "4"]
    assert [r.image for r in rows] == [("0.jpg",), ("a.png", "b.png"), (), ()]
    assert rows[0].source == "mine"


def test_rows_can_be_pickled_and_stay_small(tmp_path: Path) -> None:
    rows = write(tmp_path / "a.json", [row(n, note="x" * 1000) for n in range(100)])
    data = pickle.dumps(rows)
    assert len(data) < 3000
    assert list(pickle.loads(data)) == list(rows)


TEXT = [{"from": "human", "value": "What is it?"}, TURNS[1]]


@pytest.mark.parametrize("answer", [{}, {"answer": None}, {"response": None}])
def test_a_question_without_an_answer_is_told_as_such(tmp_path: Path, answer: dict[str, None]) -> None:
    row = {"question_id": "1", "image": "0.jpg", "question": "What?", **answer}
    rows = write(tmp_path / "a.json", [row])
    with pytest.raises(InputError, match="'question' has no answer beside it; add one or remove the row"):
        rows[0]


@pytest.mark.parametrize(
    "key", ["Image", "imgs", "photo_files", "imgae", "image1", "image_name", "media", "frame_paths"]
)
def test_pictures_under_another_key_are_told(tmp_path: Path, key: str) -> None:
    with pytest.raises(InputError, match=rf"the key '{key}' is not read; did you mean 'image'\?"):
        write(tmp_path / "a.json", [{"id": 1, key: ["a.jpg"], "conversations": TEXT}])[0]
    # An empty one names nothing; beside `image` it is a note of its own.
    for values in ({key: None}, {key: []}, {key: ""}, {key: "a", "image": "0.jpg"}):
        write(tmp_path / "a.json", [{"id": 1, "conversations": TEXT, **values}])[0]


@pytest.mark.parametrize("key", ["audio", "audios", "sound"])
@pytest.mark.parametrize("image", [{}, {"image": "0.jpg"}])
def test_what_is_no_picture_is_told(tmp_path: Path, key: str, image: dict[str, str]) -> None:
    with pytest.raises(InputError, match=f"'{key}' cannot be used, only pictures"):
        write(tmp_path / "a.json", [{"id": 1, key: "a.mp4", "conversations": TEXT, **image}])[0]


def test_other_keys_are_left_alone(tmp_path: Path) -> None:
    more = {"image_id": 17, "source": "x", "usage": 1, "page": 2, "message": "m", "height": 5}
    assert write(tmp_path / "a.json", [{"id": 1, "conversations": TEXT, **more}])[0].image == ()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (7, "expected an object, found a number"),
        ([], "expected an object, found an empty list"),
        ({"id": "x"}, "(id 'x'): 'conversations' is missing"),
        (
            {"id": "x", "conversations": []},
            "(id 'x'): 'conversations' must be a list of turns, found an empty list",
        ),
        ({"id": "x", "conversations": "hi"}, "must be a list of turns, found text"),
        ({"id": ["x"], "conversations": TURNS}, "'id' must be text or a whole number, found a list"),
        ({"id": 1.5, "conversations": TURNS}, "'id' must be text or a whole number, found 1.5"),
        ({"id": True, "conversations": TURNS}, "'id' must be text or a whole number, found true or false"),
        ({"id": "x", "conversations": [3]}, "(id 'x'): turn 1 must be an object, found a number"),
        (
            {"id": "x", "conversations": [TURNS[0], {"from": "gpt"}]},
            "turn 2 must have the texts 'from' and 'value'",
        ),
        (
            {"id": "x", "conversations": [TURNS[0], {"from": "gpt", "value": None}]},
            "turn 2 must have the texts",
        ),
        ({"id": "x", "conversations": TURNS[:1]}, "(id 'x'): no turn is from 'gpt' (they are from 'human')"),
        (
            {"id": "x", "image": 5, "conversations": TURNS},
            "(id 'x'): 'image' must be a path or a list of paths",
        ),
        ({"id": "x", "image": ["a", None], "conversations": TURNS}, 'found ["a", null]'),
        ({"id": "x", "image": "", "conversations": TURNS}, "'image' must be a path"),
    ],
)
@pytest.mark.parametrize("name", ["bad.json", "bad.jsonl"])
def test_malformed_rows_are_named(tmp_path: Path, name: str, value: Any, reason: str) -> None:
    rows = write(tmp_path / name, [row(1), value, row(3)])
    assert rows[0].id == "r1" and rows[2].id == "r3"
    with pytest.raises(InputError) as caught:
        rows[1]
    assert reason in str(caught.value)
    assert f"{name}', row 2" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty; write a table, a JSON list or one JSON object per line into it"),
        ("\x00PNG", "is no text file"),
        ("[]", "holds no rows; write a JSON list or one JSON object per line"),
        ("\n \n", "is empty"),
        ("[", "row 1: the JSON list is malformed or cut off at line 1, column 2 (it ends too early)"),
        (
            '[{"id": "a"}',
            "row 1: the JSON list is malformed or cut off at line 1, column 13 (it ends too early)",
        ),
        ('[{"id": "a"}, ', "row 2: the JSON list is malformed or cut off"),
        ('[{"id": "a"},]', "row 2: the JSON list is malformed or cut off at line 1, column 14 (a value is"),
        ('[{"id": "a"} {"id": "b"}]', "malformed or cut off at line 1, column 14 (a comma is missing)"),
        ('[{"id": "é"},\n{"id": "é" b}]', "at line 2, column 12 (a comma or a closing bracket is missing)"),
        ('[{"id": ' + "1" * 5000 + "}]", "at line 1, column 2 (a number has too many digits); fix the file"),
        (
            '[{"id": "a"}, {"id": b}]',
            "row 2: the JSON list is malformed or cut off at line 1, column 22 (a value is",
        ),
        ('[{"id": "a"}] more', "more follows the end of the JSON, at line 1, column 15; fix the file"),
        ("[" * 100_000, "row 1: the JSON list is malformed"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(InputError) as caught:
        Rows(tmp_path / "f.json")
    assert reason in str(caught.value) and "f.json'" in str(caught.value)


@pytest.mark.parametrize(("name", "separator"), [("t.csv", ","), ("t.tsv", "\t")])
def test_a_header_alone_is_told_as_such(tmp_path: Path, name: str, separator: str) -> None:
    (tmp_path / name).write_text(f"question{separator}answer\n")
    with pytest.raises(InputError, match=rf"{name}' holds no rows; add some below its header"):
        Rows(tmp_path / name)


def test_unreadable_files_and_lines_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.json' cannot be read: No such file"):
        Rows(tmp_path / "missing.json")
    with pytest.raises(InputError, match=r"the folder '.*' holds no rows that can be read: nothing; name a"):
        Rows(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(json.dumps(row(1)).encode() + b'\n{"id": \n{"id": "\xff"}\n')
    rows = Rows(tmp_path / "a.jsonl")
    for index, what in ((1, "JSON"), (2, "UTF-8")):
        with pytest.raises(InputError, match=rf"a\.jsonl', row {index + 1}: this is not {what}"):
            rows[index]


def test_row_becomes_a_checked_conversation(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").touch()
    finder = ImageFinder(tmp_path)
    good = write(tmp_path / "a.jsonl", [row(1)])[0].conversation(finder)
    assert good.id == "r1" and [m.role for m in good.messages] == ["user", "assistant"]
    assert [i.source for i in good.images] == [tmp_path / "1.jpg"]
    assert good.messages[0].text == "What is it?"
    bad = {
        "turn 1 is from 'gpt' where 'human'": row(1, conversations=[TURNS[1]], image=None),
        "1 <image> placeholder for 2 pictures": row(1, image=["1.jpg", "1.jpg"]),
        "1 <image> placeholder for 0 pictures": row(1, image=None),
        "is an empty answer": row(1, conversations=[TURNS[0], {"from": "gpt", "value": " "}]),
        "the last question has no answer": row(1, conversations=[*TURNS, {"from": "human", "value": "?"}]),
    }
    for reason, value in bad.items():
        with pytest.raises(InputError) as caught:
            write(tmp_path / "b.jsonl", [value])[0].conversation(finder)
        assert reason in str(caught.value) and "'r1'" in str(caught.value)


def test_finder_searches_roots_in_order(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    (two / "deep").mkdir(parents=True)
    one.mkdir()
    for path in (
        one / "a.jpg",
        two / "a.jpg",
        two / "deep/b.png",
        two / "c.PNG",
        two / "d.e.gif",
        two / "a.gif",
    ):
        path.touch()
    finder = ImageFinder([one, str(two)])
    assert finder.find("a.jpg") == one / "a.jpg"
    assert finder.find("deep/b.png") == two / "deep/b.png"
    assert finder.find("deep/../a.gif") == two / "deep/../a.gif"  # another root's exact name before a sibling
    assert finder.find("deep/b.jpg") == two / "deep/b.png"
    assert finder.find("c.jpg") == two / "c.PNG"
    assert finder.find("d.e.jpg") == two / "d.e.gif"
    assert finder.find("deep/b") == two / "deep/b.png"
    assert finder.find(str(two / "a.jpg")) == two / "a.jpg"


def test_finder_refuses(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "folder.jpg").mkdir(parents=True)
    (tmp_path / "secret.jpg").touch()
    finder = ImageFinder([root, tmp_path / "root"])
    for name in ("../secret.jpg", "a/../../secret.jpg", "..", "..\\secret.jpg"):
        with pytest.raises(InputError, match="leads out of the image folders"):
            finder.find(name)
    for name in ("no.jpg", "folder.jpg", "n" * 300, "nul\0.jpg", ".", "a/.."):
        with pytest.raises(InputError) as caught:
            finder.find(name)
        assert f"picture {name!r} is not in '{root}'" in str(caught.value)
    with pytest.raises(InputError, match=r"no\.jpg' does not exist"):
        finder.find(str(tmp_path / "no.jpg"))
    with pytest.raises(InputError, match=r"the image folder '.*nowhere' does not exist"):
        ImageFinder(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no image folder is given"):
        ImageFinder([])


@pytest.mark.parametrize("path", ["rows.jsonl", "{folder}", "{folder}/*.jsonl", "~/rows.jsonl"])
def test_a_file_has_one_digest_however_it_is_named(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write(tmp_path / "rows.jsonl", [row(0)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert Rows(path.format(folder=tmp_path)).digest() == rows.digest()
