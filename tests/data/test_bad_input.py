"""What people really have is often damaged: each damage is told by row and source, and nothing is guessed."""

from __future__ import annotations

import errno
import gzip
import io
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from samples import Examples, jsonl, llava

from pumice.data.check import check, fold
from pumice.data.mapping import RowMapping
from pumice.data.rows import ImageFinder, Rows
from pumice.data.sources import columns
from pumice.errors import InputError

ASKS = {"role": "user", "content": "<image>"}
ANSWERS = {"role": "assistant", "content": "b"}


def problems(rows: Rows, folder: Path) -> list[tuple[int, str, str]]:
    report = check([rows], ImageFinder(folder))
    found = [(problem.row, problem.kind, problem.reason) for problem in report.problems]
    return [problem for problem in found if problem[1] != "<image> added"]


@pytest.fixture
def parquet(examples: Examples, tmp_path: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    writer = pytest.importorskip("pyarrow.parquet")
    values = [
        {
            "id": r.id,
            "image": {"bytes": examples.bytes_of(r), "path": "x.png"},
            "question": r.question,
            "answer": r.answer,
        }
        for r in examples.rows
    ]
    writer.write_table(pyarrow.Table.from_pylist(values), tmp_path / "whole.parquet", row_group_size=5)
    return tmp_path / "whole.parquet"


def test_a_parquet_file_that_is_cut_off(parquet: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.parquet").write_bytes(parquet.read_bytes()[:-300])
    with pytest.raises(InputError, match=r"cut\.parquet' is cut off or damaged \(.*\); fetch it again"):
        Rows(tmp_path / "cut.parquet")


def test_a_parquet_file_that_is_damaged_inside(parquet: Path, tmp_path: Path) -> None:
    data = bytearray(parquet.read_bytes())
    data[10:400] = bytes(390)
    (tmp_path / "torn.parquet").write_bytes(data)
    found = problems(Rows(tmp_path / "torn.parquet"), tmp_path)
    # Row groups have five rows, and only the first is damaged.
    assert [row for row, _, _ in found] == [1, 2, 3, 4, 5]
    for row, _, reason in found:
        assert f"torn.parquet', row {row}: the file is cut off or damaged here (" in reason


def test_no_room_to_unpack_a_block(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(columns._Block, "add", full)
    with pytest.raises(InputError, match=r"\(No space left on device\); set PUMICE_CACHE to a"):
        Rows(parquet)[0]


@pytest.mark.parametrize("lost", [300, 1024 * 10])
def test_a_tar_that_is_cut_in_the_middle(examples: Examples, tmp_path: Path, lost: int) -> None:
    with tarfile.open(tmp_path / "r.tar", "w") as archive:
        for row in examples.rows:
            for ending, data in (("png", examples.bytes_of(row)), ("txt", row.answer.encode())):
                member = tarfile.TarInfo(f"{row.id}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        end = archive.offset
    data = (tmp_path / "r.tar").read_bytes()
    (tmp_path / "r.tar").write_bytes(data[: end - lost])
    rows = Rows(tmp_path / "r.tar")
    assert 0 < len(rows) <= 24
    [(number, kind, reason)] = problems(rows, tmp_path)
    assert (number, kind) == (len(rows), "malformed row")
    key = examples.rows[len(rows) - 1].id
    assert f"r.tar', row {len(rows)} (sample '{key}'): the archive is cut off here; fetch it again" in reason
    with pytest.raises(InputError, match=r"r\.tar' is cut off or no tar archive"):
        (tmp_path / "r.tar").write_bytes(data[:400])
        Rows(tmp_path / "r.tar", mapping=None)[0]


def test_columns_that_differ_between_shards(examples: Examples, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    first = pandas.DataFrame([r.__dict__ for r in examples.rows[:12]])
    second = first.rename(columns={"answer": "reply", "question": "ask"})
    first.to_parquet(tmp_path / "train-0.parquet")
    second.to_parquet(tmp_path / "train-1.parquet")
    rows = Rows(tmp_path / "*.parquet")
    found = problems(rows, examples.folder)
    assert [row for row, kind, _ in found if kind == "malformed row"] == list(range(13, 25))
    assert (
        "train-1.parquet', row 1 (id 'r0'): 'conversations' is missing, and no known form has" in found[0][2]
    )
    assert "columns: {image: image, question: ask, answer: reply}" not in found[0][2]
    assert "columns: {question: ask, answer: reply}" in found[0][2]
    report = check([rows], ImageFinder(examples.folder))
    assert [len(same) for same in fold(p for p in report.problems if p.kind == "malformed row")] == [12]


def test_pictures_that_are_bytes_of_nothing(examples: Examples, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    pictures = [
        examples.bytes_of(examples.rows[0]),
        b"",
        b"nothing",
        examples.bytes_of(examples.rows[0])[:60],
    ]
    table = {"image": pictures, "question": ["What?"] * 4, "answer": ["A cat."] * 4}
    pandas.DataFrame(table).to_parquet(tmp_path / "r.parquet")
    found = problems(Rows(tmp_path / "r.parquet"), tmp_path)
    assert [(row, kind) for row, kind, _ in found] == [(n, "picture unreadable") for n in (2, 3, 4)]
    assert "is empty (0 bytes)" in found[0][2] and "r.parquet, row 2, image" in found[0][2]
    assert "is not a picture that can be read" in found[1][2] and "r.parquet, row 3" in found[1][2]


def test_lists_of_unequal_lengths(tmp_path: Path) -> None:
    rows = Rows(jsonl(tmp_path / "r", [{"id": "x", "questions": ["What?", "Why?"], "answers": ["A cat."]}]))
    with pytest.raises(InputError, match=r"row 1 \(id 'x'\): 2 in 'questions' and 1 in 'answers'; give each"):
        rows[0]


def test_a_class_folder_without_pictures(examples: Examples, tmp_path: Path) -> None:
    examples.folder.rename(tmp_path / "set_cat")
    (tmp_path / "set").mkdir()
    (tmp_path / "set_cat").rename(tmp_path / "set" / "cat")
    (tmp_path / "set" / "dog").mkdir()
    with pytest.raises(InputError, match=r"the class folder '.*dog' holds no picture; add some or remove it"):
        Rows(tmp_path / "set")


def test_a_table_with_quotes_across_lines(examples: Examples, tmp_path: Path) -> None:
    text = (
        'id,image,question,answer\nr0,00.png,"What is\nthis, ""really""?",A cat.\nr1,00.png,"Not closed,A.\n'
    )
    (tmp_path / "r.csv").write_text(text)
    with pytest.raises(InputError, match=r"r\.csv', row 2: a quote is not closed or stands alone"):
        Rows(tmp_path / "r.csv")
    (tmp_path / "r.csv").write_text(text.replace("Not closed,", 'Closed?",more,'))
    rows = Rows(tmp_path / "r.csv")
    assert rows[0].turns[0][1] == '<image>\nWhat is\nthis, "really"?'
    with pytest.raises(InputError, match=r"row 2: 5 columns where the header has 4; put quotes around"):
        rows[1]


def test_another_encoding(tmp_path: Path) -> None:
    text = "question,answer\nWas?,Ein Käfer.\nWas?,Ein Hund.\n"
    (tmp_path / "r.csv").write_bytes(text.encode("latin-1"))
    [(row, kind, reason)] = problems(Rows(tmp_path / "r.csv"), tmp_path)
    assert (
        (row, kind) == (1, "malformed row") and "this is not UTF-8" in reason and "save the file as" in reason
    )
    (tmp_path / "r.csv").write_bytes(text.encode("utf-16"))
    with pytest.raises(InputError, match=r"r\.csv' is in UTF-16; save it as UTF-8"):
        Rows(tmp_path / "r.csv")


@pytest.mark.parametrize(
    "other", [{"images": ["b.png"]}, {"image": None, "image_path": "b.png", "photo": "c.png"}]
)
def test_two_columns_that_could_both_be_the_picture(tmp_path: Path, other: dict[str, Any]) -> None:
    path = jsonl(tmp_path / "r", [{"image": "a.png", "question": "What?", "answer": "A cat.", **other}])
    with pytest.raises(
        InputError, match=r"'\w+' and '\w+' could both be the picture; .* columns: \{image: \w+\}"
    ):
        Rows(path)[0]
    chosen = list(other)[-1]
    rows = Rows(path, mapping=RowMapping({"image": chosen}))
    assert rows[0].image == ({"images": "b.png", "photo": "c.png"}[chosen],)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"video_url": "v.mp4"}, "the key 'video_url' is not read; did you mean 'video'?"),
        ({"audio_path": "a.wav"}, "'audio_path' cannot be used"),
        ({"image": "https://x.org/a.png"}, "is a web address; save it to a file"),
    ],
)
def test_media_under_other_keys_are_told_and_never_learned_as_text(
    tmp_path: Path, value: dict[str, Any], message: str
) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    path = jsonl(tmp_path / "r", [{"id": "x", "conversations": turns, **value}])
    [*_, (row, _, reason)] = problems(Rows(path), tmp_path)
    assert row == 1 and message in reason


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"chat": [ASKS]}, "this looks like OpenAI messages in JSON; write columns: {messages: chat}"),
        ({"chat": '[{"from": "a", "value": "b"}]'}, "ShareGPT turns in JSON; write columns: {conv"),
        ({"my": "a.png", "ask": "?", "reply": "!"}, "columns: {image: my, question: ask, answer: reply}"),
        (
            {"messages": [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}]},
            "(they are from 'human', 'gpt'), so there is nothing to learn; roles are written 'user' and",
        ),
        ({"messages": []}, "'messages' must be a list of messages, found an empty list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message is from 'assistant'"),
        ({"messages": [ASKS, ANSWERS]}, "1 <image> placeholder for 0 pictures"),
        ({"images": ["a", "b"], "messages": [ASKS, ANSWERS]}, "1 <image> placeholder for 2 pictures"),
        ({"messages": [{**ANSWERS, "weight": 0}]}, "message 1 has weight 0, and every answer is learned"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "message 1: unknown part"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "1 <image> placeholder for 0"),
        ({"texts": [1]}, "its values are not of its form"),
        ({"texts": [{"user": "a"}]}, "its values are not of its form (KeyError, 'assistant')"),
        ({"query": "a", "response": "b", "history": [["c"]]}, "its values are not of its form"),
        ({"query": "a", "response": "b", "history": 5}, "its values are not of its form"),
        ({"prompt": 5, "completion": 6}, "its values are not of its form"),
        ({"messages": [{"role": "user", "content": [{"image": 5}]}, ANSWERS]}, "not of its form"),
        ({"text": "A cat."}, "'text' stands without a picture and without a question"),
        ({"question": "What?", "answers": []}, "the list of answers is empty"),
        ({"question": "What?", "answer": {"a": 1}}, "expected a text, found an object"),
        ({"path": "a.JPG", "question": "?", "answer": "!"}, "'path' names a picture, and is not read as one"),
        ({"file": {"path": "a.png"}, "text": "A cat."}, "write columns: {image: file}"),
        ({"jpg": "/9j/" + "A" * 99, "query": "?", "response": "!"}, "write columns: {image: jpg}"),
        ({"image": "a.png", "question": "?", "choices": ["a", "b"], "answer": 1}, "number of one of the"),
        ({"image": "a.png", "question": "?", "options": "['a', 'b']", "answer": "0"}, "number of one of the"),
        ({"question_id": 1, "image": "a.png", "text": "What?"}, "a question of LLaVA's without its answer"),
        ({"prompt": "?", "chosen": "a", "rejected": "b"}, "columns: {question: prompt, answer: chosen}"),
        ({"image": "a.png", "prompt": "?", "response": "!"}, "columns: {question: prompt, answer: response}"),
        ({"image": "a.png", "description": "A cat."}, "columns: {caption: description}"),
        ({"image": "a.png", "question": "?", "answer": float("nan")}, "'question' has no answer beside it"),
        ({"image": "a.png", "height": 5}, "there is a picture, but no question, answer, caption"),
    ],
)  # fmt: skip
def test_what_cannot_be_mapped_says_how_it_could(tmp_path: Path, value: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Rows(jsonl(tmp_path / "r", [value]))[0]
    assert message in str(caught.value) and "r', row 1: " in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a.png,What?,A cat.\n", "has no header, its first line names a picture"),
        (b"caption\nA cat.\n", "is neither JSON nor a table of several columns"),
        (b"names: [cat]\n", "is neither JSON nor a table of several columns"),
        (
            b'{"1": {"image": "a.png"}, "2": {"image": "b.png"}}',
            "is one JSON object of 2 objects; write a list",
        ),
        (
            b'{\n"id": 1}\n{"id": \n',
            "the JSON is malformed or cut off at line 4, column 1 (it ends too early); fix the file",
        ),
        (b"PK\x03\x04" + bytes(26) + b"[Content_Types].xml", "is an Excel workbook; save its table as CSV"),
    ],
)
def test_files_in_no_form_say_what_to_do(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "r").write_bytes(data)
    with pytest.raises(InputError, match=re.escape(message)):
        Rows(tmp_path / "r")


def test_a_first_row_that_is_damaged_spoils_no_other(tmp_path: Path) -> None:
    good = json.dumps({"question": "What?", "answer": "A cat."})
    for bad in ('{"id": "torn", "conversations": [', "nothing", '{"a": "not closed'):
        (tmp_path / "r").write_text(f"{bad}\n{good}\n{good}\n")
        assert [row for row, _, _ in problems(Rows(tmp_path / "r"), tmp_path)] == [1]


@pytest.fixture
def packing(examples: Examples) -> str:
    """The command with which a refusal of pictures with texts beside them says how to pack them."""
    for number in range(12):
        (examples.folder / f"{number:02}.txt").write_text(f"A cat, {number}.")
    with pytest.raises(InputError, match="beside each a file of its name; pack them") as caught:
        Rows(examples.folder)
    return str(caught.value).rpartition(": ")[2]


def test_pictures_with_texts_beside_them(packing: str, examples: Examples) -> None:
    assert packing == f"tar --sort=name -cf rows.tar -C '{examples.folder}' ."


def test_pictures_and_texts_that_are_packed_as_told(packing: str, tmp_path: Path) -> None:
    tar = shutil.which("tar")
    if tar is None or b"GNU tar" not in subprocess.check_output([tar, "--version"]):
        pytest.skip("the command is for GNU tar, which is not installed")
    subprocess.run(packing, shell=True, cwd=tmp_path, check=True)
    assert [row.turns[1][1] for row in Rows(tmp_path / "rows.tar")] == [f"A cat, {n}." for n in range(12)]


def test_a_folder_in_a_tar_is_no_webdataset(examples: Examples, tmp_path: Path) -> None:
    jsonl(examples.folder / "rows.jsonl", [])
    with tarfile.open(tmp_path / "r.tar", "w") as archive:
        archive.add(examples.folder, "set")
    with pytest.raises(InputError, match=r"r\.tar' holds 'set/rows\.jsonl', a file of rows; unpack it and"):
        Rows(tmp_path / "r.tar")


def test_wrong_columns_in_a_recipe(tmp_path: Path, examples: Examples) -> None:
    path = llava(examples.rows, tmp_path / "r.json").path
    with pytest.raises(InputError, match="columns: there is no role 'picture'; use one of id, image, "):
        Rows(path, mapping=RowMapping({"picture": "image"}))
    with pytest.raises(
        InputError, match="columns names 'photo' as image, but there are only 'id', 'image', "
    ):
        Rows(path, mapping=RowMapping({"image": "photo"}))[0]


def test_packed_and_unknown_files(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    with pytest.raises(InputError, match=r"r\.jsonl\.gz' is packed with gzip; unpack it first"):
        Rows(tmp_path / "r.jsonl.gz")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").write_text("x")
    with pytest.raises(InputError, match=r"holds no rows that can be read: 1 \.md; name a file of rows"):
        Rows(tmp_path / "empty")
    with pytest.raises(InputError, match=r"no\*\.json' match no file; check the pattern"):
        Rows(tmp_path / "no*.json")
    (tmp_path / "q.json").write_text(
        json.dumps({"questions": [{"question_id": 1, "image_id": 2, "question": "?"}]})
    )
    with pytest.raises(
        InputError, match="holds VQA's questions, but no file beside it its annotations; put both in"
    ):
        Rows(tmp_path / "q.json")
