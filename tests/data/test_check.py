"""Every problem is found, counted and located; what is sound is left in peace."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pumice.conversation import Conversation
from pumice.data.check import check
from pumice.data.fix import fix
from pumice.data.images import MIN_FOR_PROCESSES, decode_all
from pumice.data.rows import ImageFinder, Rows
from pumice.errors import InputError

ASK = {"from": "human", "value": "<image>\nWhat?"}
ASK_TEXT = {"from": "human", "value": "What?"}
ANSWER = {"from": "gpt", "value": "A cat."}


def row(row_id: str, image: Any = "good.png", *turns: dict[str, str]) -> dict[str, Any]:
    return {"id": row_id, "image": image, "conversations": list(turns) or [ASK, ANSWER]}


@pytest.fixture
def images(tmp_path: Path) -> ImageFinder:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (20, 20)).save(folder / "good.png")
    data = (folder / "good.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    return ImageFinder(folder)


def rows(path: Path, values: list[Any]) -> Rows:
    path.write_text("\n".join(json.dumps(v) for v in values))
    return Rows(path)


def test_every_problem_is_located(tmp_path: Path, images: ImageFinder) -> None:
    source = rows(
        tmp_path / "mixed.jsonl",
        [
            row("fine"),
            row("gone", "missing.png"),
            row("cut", "cut.png"),
            row("suffix", "good.jpg"),
            row("roles", None, ANSWER, ASK_TEXT),
            row("silent", None, ASK_TEXT, {"from": "gpt", "value": " "}),
            row("holes", "good.png", ASK_TEXT, ANSWER),
            row("fine"),
            {"id": "broken"},
            row("two", ["missing.png", "cut.png"], {"from": "human", "value": "<image> <image>"}, ANSWER),
            row("text", None, ASK_TEXT, ANSWER),
            row("unanswered", None, ASK_TEXT, ANSWER, ASK_TEXT),
        ],
    )
    ticks: list[int] = []
    report = check([source], images, progress=lambda: ticks.append(1))
    assert [(p.row, p.id, p.kind) for p in report.problems] == [
        (2, "gone", "picture missing"),
        (3, "cut", "picture unreadable"),
        (4, "suffix", "wrong extension"),
        (5, "roles", "roles out of order"),
        (6, "silent", "empty answer"),
        (7, "holes", "<image> added"),
        (8, "fine", "duplicate id"),
        (9, "", "malformed row"),
        (10, "two", "picture missing"),
        (10, "two", "picture unreadable"),
        (12, "unanswered", "roles out of order"),
    ]
    reasons = {(p.id, p.kind): p.reason for p in report.problems}
    assert "'good.jpg' is stored as 'good.png'" in reasons["suffix", "wrong extension"]
    assert "cut.png" in reasons["cut", "picture unreadable"]
    assert "row 1 has the same id" in reasons["fine", "duplicate id"]
    assert "'broken'" in reasons["", "malformed row"]
    assert report.rows == len(ticks) == 12 and report.usable == 5 and not report.ok
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert report.to_dict()["sources"]["mixed"]["problems"]["picture missing"] == 2


def test_without_decoding_damage_is_not_seen(tmp_path: Path, images: ImageFinder) -> None:
    report = check([rows(tmp_path / "a.jsonl", [row("cut", "cut.png")])], images, decode=False)
    assert report.ok and report.problems == []


def test_pictures_are_opened_once(
    tmp_path: Path, images: ImageFinder, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: Counter[Path] = Counter()
    monkeypatch.setattr("pumice.data.images.open_image", lambda path: opened.update([path]))
    source = rows(tmp_path / "a.jsonl", [row(str(n)) for n in range(5)])
    assert check([source], images).ok
    assert list(opened.values()) == [1]


def test_sources_and_budget(tmp_path: Path, images: ImageFinder) -> None:
    good = rows(tmp_path / "good.jsonl", [row(str(n)) for n in range(9)])
    bad = rows(tmp_path / "bad.jsonl", [row("0", "missing.png")])
    assert not check([good, bad], images).ok
    report = check([good, bad], images, budget=0.1)
    assert report.ok and not check([good, bad], images, budget=0.09).ok
    assert (report.sources["good"].usable, report.sources["bad"].usable) == (9, 0)
    assert report.sources["bad"].problems == {"picture missing": 1}, "ids repeat between sources freely"
    with pytest.raises(InputError, match="two sources are called 'good'"):
        check([good, good], images)
    with pytest.raises(InputError, match=r"the budget is 1\.5"):
        check([good], images, budget=1.5)


def test_lengths_come_from_the_caller(tmp_path: Path, images: ImageFinder) -> None:
    def encode(conversation: Conversation) -> tuple[int, int]:
        if conversation.id == "odd":
            raise InputError("no room for an image")
        assert [i.source for i in conversation.images] == [images.roots[0] / "good.png"]
        answer = conversation.messages[-1].text
        return 10 + len(answer), 0 if answer == "mute" else len(answer)

    answers = {"short": "ab", "long": "x" * 90, "none": "mute", "odd": "y"}
    values = [row(k, "good.png", ASK, {"from": "gpt", "value": v}) for k, v in answers.items()]
    source = rows(tmp_path / "a.jsonl", [*values, row("gone", "missing.png")])
    report = check([source], images, encode=encode, context=99)
    assert [(p.id, p.kind) for p in report.problems] == [
        ("long", "too long"),
        ("none", "nothing supervised"),
        ("odd", "not encoded"),
        ("gone", "picture missing"),
    ]
    assert report.usable == 1
    tokens = report.to_dict()["sources"]["a"]["tokens"]
    assert tokens["total"] == 12 + 100 + 14 and tokens["longest"] == 100 and tokens["median"] == 14
    assert tokens["supervised_share"] == pytest.approx(2 / 12)  # of the one that can be used
    assert check([source], images).to_dict()["sources"]["a"]["tokens"] is None


def test_every_kind_of_spoiled_row_is_told_by_row_and_reason(bad_rows: Any, tmp_path: Path) -> None:
    folder, bad = bad_rows
    good = json.dumps(row("good"))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(text for entry in bad for text in (entry.text, good)) + "\n")
    report = check([Rows(path)], ImageFinder(folder))
    problems = [problem for problem in report.problems if problem.kind != "duplicate id"]
    assert [(p.row, p.kind) for p in problems] == [(2 * n + 1, entry.kind) for n, entry in enumerate(bad)]
    for problem, entry in zip(problems, bad, strict=True):
        assert entry.reason in problem.reason, problem
    assert report.usable == len(bad) >= 20, "the sound rows between them stay"


def test_a_picture_in_another_format_than_its_name_is_noted(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.jpg", format="GIF")
    Image.new("RGB", (9, 9)).save(tmp_path / "b.jpeg", format="JPEG")
    source = rows(tmp_path / "a.jsonl", [row("a", "a.jpg"), row("b", "b.jpeg")])
    report = check([source], ImageFinder(tmp_path))
    assert [(p.id, p.kind, p.reason) for p in report.problems] == [
        ("a", "wrong extension", "picture 'a.jpg' holds GIF")
    ]
    assert report.usable == 2


def test_processes_find_what_one_finds(tmp_path: Path) -> None:
    for number in range(MIN_FOR_PROCESSES + 6):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number:03}.png")
    (tmp_path / "007.png").write_bytes(b"no picture")
    paths = sorted(tmp_path.glob("*.png"))
    ticks: list[int] = []
    checked = decode_all(paths, workers=2, progress=ticks.append)
    assert checked == decode_all(paths) and list(checked) == paths and sum(ticks) == len(paths)
    assert [path.name for path, check in checked.items() if check.unreadable] == ["007.png"]


def test_rows_to_be_truncated_are_counted_and_stay(tmp_path: Path, images: ImageFinder) -> None:
    values = [row(str(n), None, ASK_TEXT, {"from": "gpt", "value": "x" * n}) for n in (10, 40, 200)]
    source = rows(tmp_path / "a.jsonl", values)

    def encode(conversation: Conversation) -> tuple[int, int]:
        return len(conversation.messages[-1].text), 5

    report = check([source], images, encode=encode, context=64, truncate=True)
    tokens = report.to_dict()["sources"]["a"]["tokens"]
    assert report.usable == 3 and tokens["too_long_share"] == pytest.approx(1 / 3)
    assert tokens["histogram"] == {"up to 32": 1, "up to 64": 1, "up to 128": 0, "up to 256": 1}
    assert check([source], images, encode=encode, context=64).usable == 2


def test_a_fixed_copy_can_be_used_and_the_original_stays(tmp_path: Path, images: ImageFinder) -> None:
    other = {"from": "gpt", "value": "A dog."}
    values = [
        row("a", "good.jpg") | {"extra": "kept", "caf\u00e9": 1},
        row("a", "good.jpg"),
        row("a", "good.jpg", ASK, other),
        row("gone", "missing.png"),
        row("b", ["good.png"]),
    ]
    source = rows(tmp_path / "rows.jsonl", values)
    before = source.path.read_bytes()
    report = check([source], images)
    out = tmp_path / "fixed.json"
    fixed = fix(source, images, report, out)
    assert source.path.read_bytes() == before
    assert fixed == {
        "rows written": 3,
        "rows left out": 1,
        "pictures named as they are stored": 3,
        "rows given <image>": 0,
        "repeated rows left out": 1,
        "ids made different": 1,
    }
    again = check([Rows(out)], images)
    assert again.ok and again.problems == []
    written = json.loads(out.read_text())
    assert [(w["id"], w["image"]) for w in written] == [
        ("a", "good.png"), ("a-2", "good.png"), ("b", ["good.png"]),
    ]  # fmt: skip
    assert written[0]["extra"] == "kept" and written[0]["caf\u00e9"] == 1
    assert len(Rows(out)) == 3


@pytest.mark.parametrize("key", ["images", "file_name"])
def test_a_fixed_copy_names_its_pictures_once(tmp_path: Path, images: ImageFinder, key: str) -> None:
    values = {"id": "a", key: "good.jpg", "conversations": [ASK, ANSWER], "extra": "kept"}
    source = rows(tmp_path / "rows.jsonl", [values])
    fix(source, images, check([source], images), tmp_path / "fixed.jsonl")
    [written] = map(json.loads, (tmp_path / "fixed.jsonl").read_text().splitlines())
    assert written == {**row("a"), "extra": "kept"}
    assert Rows(tmp_path / "fixed.jsonl")[0].image == ("good.png",)


def test_a_fixed_copy_never_replaces_what_is_checked(tmp_path: Path, images: ImageFinder) -> None:
    source = rows(tmp_path / "rows.jsonl", [row("a")])
    (tmp_path / "link.jsonl").symlink_to(source.path)
    report = check([source], images)
    for out in (source.path, tmp_path / "link.jsonl"):
        with pytest.raises(InputError, match="is the file that is checked"):
            fix(source, images, report, out)
    with pytest.raises(InputError, match="there is no folder"):
        fix(source, images, report, tmp_path / "no" / "rows.jsonl")
