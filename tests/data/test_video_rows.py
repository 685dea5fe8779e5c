"""Rows with videos, in the forms that published sets have: where each stands, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from samples import pack, png

from pumice.conversation import StoredImage, Video
from pumice.data import images
from pumice.data.check import check
from pumice.data.convert import convert
from pumice.data.fix import fix
from pumice.data.images import DecodedImage
from pumice.data.rows import ImageFinder, Rows, to_llava
from pumice.errors import InputError
from pumice.images import read_image
from pumice.video import read_frames

ANSWER = {"from": "gpt", "value": "A cat."}


def write(folder: Path, *rows: dict[str, Any]) -> Rows:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Rows(path)


def row(text: str, **media: Any) -> dict[str, Any]:
    return {"id": "1", **media, "conversations": [{"from": "human", "value": text}, ANSWER]}


def animation(path: Path, frames: int = 3) -> None:
    first, *others = (Image.new("RGB", (20, 10), (90 * n, 0, 0)) for n in range(frames))
    first.save(path, save_all=True, append_images=others, duration=100)


@pytest.mark.parametrize(
    ("values", "media"),
    [
        (row("<video>\nWhat?", video="a.gif"), [Video("a.gif")]),
        (row("<image>\nWhat?", video="a.gif"), [Video("a.gif")]),  # LLaVA-Video's
        (row("What?", video="a.gif"), [Video("a.gif")]),
        (row("<image> and <video>?", image="b.png", videos=["a.gif"]), ["b.png", Video("a.gif")]),
        (row("<video> or <image>?", images=["b.png"], videos=["a.gif"]), [Video("a.gif"), "b.png"]),
        (row("<video><video>", video=["a.gif", "c.gif"]), [Video("a.gif"), Video("c.gif")]),
    ],
)
def test_forms_of_rows(tmp_path: Path, values: dict[str, Any], media: list[Any]) -> None:
    [read] = write(tmp_path, values)
    assert list(read.image) == media
    conversation = read.conversation(None)
    assert [image.source for image in conversation.images] == media
    assert not any("<" in message.text for message in conversation.messages)
    # Written as LLaVA has it, it is the same row.
    [again] = write(tmp_path, to_llava(read))
    assert (again.image, again.turns) == (read.image, read.turns)


def test_messages(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "A cat."}
    parts = [{"type": "video", "video": "a.gif"}, {"type": "image", "image": "b.png"}]
    inside = {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}, answer]}
    beside = {"messages": [{"role": "user", "content": "<video>What?"}, answer], "videos": ["a.gif"]}
    first, second = write(tmp_path, inside, beside)
    assert list(first.image) == [Video("a.gif"), "b.png"] and list(second.image) == [Video("a.gif")]
    assert [image.source for image in second.conversation(None).images] == [Video("a.gif")]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (row("<video> and <video>", video="a.gif"), "2 <video> for 1 video; write"),
        (row("<image>", image="b.png", video="a.gif"), "0 <video> for 1 video; write"),
        (row("What?", video=3), "'video' must be a path or a list of paths of videos"),
        (row("What?", vidio="a.gif"), r"the key 'vidio' is not read; did you mean 'video'\?"),
        (row("What?", video_path="a.gif"), r"the key 'video_path' is not read; did you mean 'video'\?"),
        (row("What?", audio="a.wav"), "'audio' cannot be used, only pictures and videos"),
        (row("What?", video={"bytes": "x", "path": None}), "must be a path"),
        (
            {"messages": [{"role": "user", "content": "What?"}], "videos": ["a.gif"], "images": ["b.png"]},
            "have no order; write them as parts",
        ),
    ],
)
def test_wrong_rows(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        write(tmp_path, values)[0]


def test_videos_inside_tables_and_archives(tmp_path: Path) -> None:
    """Bytes of a parquet column `video`, members of a tar: the same rows as of a file."""
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    pq = pytest.importorskip("pyarrow.parquet")
    animation(tmp_path / "a.gif")
    clip = (tmp_path / "a.gif").read_bytes()
    turns = row("<video>\nWhat?")["conversations"]
    table = [
        {"id": "0", "video": {"bytes": clip, "path": "a.mp4"}, "conversations": turns},
        {"id": "1", "video": {"bytes": None, "path": "a.gif"}, "conversations": turns},
        {"id": "2", "video": {"bytes": b"broken", "path": None}, "conversations": turns},
    ]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "rows.parquet")
    values = row("<image> beside <video>?", video="elsewhere.mp4") | {"id": "0"}
    asked = json.dumps({"question": "What?", "answer": "A cat."}).encode()
    files = {
        "0.json": json.dumps(values).encode(), "0.mp4": clip, "0.png": png(0),
        "1.json": asked, "1.0.webm": clip, "1.1.webm": b"torn", "2.json": asked, "2.wav": b"RIFF",
    }  # fmt: skip
    pack(tmp_path / "rows.tar", files)
    finder = ImageFinder(tmp_path)
    for rows, count in ((Rows(tmp_path / "rows.parquet"), 3), (Rows(tmp_path / "rows.tar"), 2)):
        conversation = rows[0].conversation(finder)
        [video] = [image.source for image in conversation.images if isinstance(image.source, Video)]
        assert len(read_frames(video, None).images) == 3
        assert (
            rows.contents.usable.sum() == count
            and rows.contents.arrays["videos"].any()
            and rows.contents.has_stored
        )
        assert not rows.bad_rows(finder)[:count].any()
        assert rows.contents.max_images(8) >= 8
        report = check([rows], finder)
        assert [p.kind for p in report.problems if p.row <= count] == ["picture unreadable"]
        convert(rows, tmp_path / f"{rows.path.suffix}.out", "llava", finder, max_bad_rows=1)
        [same, *_] = Rows(tmp_path / f"{rows.path.suffix}.out" / "rows.jsonl")
        [file] = [image for image in same.image if isinstance(image, Video)]
        assert Path(file.name).suffix == ".mp4"
        assert (tmp_path / f"{rows.path.suffix}.out" / file.name).read_bytes() == clip
    # Equal contents in a table and in an archive are the same video; order is that of the places.
    table_row, tar_row = Rows(tmp_path / "rows.parquet"), Rows(tmp_path / "rows.tar")
    keys = [rows.contents.arrays["keys"].tolist() for rows in (table_row, tar_row)]
    assert keys[0][0] in keys[1]
    assert [isinstance(image, Video) for image in tar_row[0].image] == [False, True]
    assert isinstance(table_row[0].image[0].source, StoredImage)
    assert table_row[1].image == (Video("a.gif"),)
    with pytest.raises(InputError, match="'audio' cannot be used, only pictures and videos"):
        tar_row[2]


@pytest.mark.parametrize("form", ["llava", "parquet", "webdataset"])
def test_videos_are_converted_and_read_back(form: str, tmp_path: Path) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    animation(tmp_path / "a.gif")
    animation(tmp_path / "a.webp", 4)
    film = b"\0\0\0\x18ftypmp42" + bytes(40)  # the beginning of an MP4: only its name and contents count here
    for name in ("c.mpg", "c.film"):
        (tmp_path / name).write_bytes(film)
    (tmp_path / "b.png").write_bytes(png(0))
    rows = write(
        tmp_path,
        row("<video> or <image> or <video>?", images=["b.png"], videos=["a.gif", "c.mpg"]),
        row("<video>", video="a.webp"), row("<image>", image="a.gif"), row("<video>", video="c.film"),
        row("What?"),
    )  # fmt: skip
    finder = ImageFinder(tmp_path)
    convert(rows, tmp_path / "out", form, finder, rows_per_file=2)
    [suffix] = {path.suffix for path in (tmp_path / "out").iterdir() if path.stem.startswith("rows")}
    again = Rows(tmp_path / "out" / ("rows.jsonl" if form == "llava" else f"rows-*{suffix}"))
    assert not again.bad_rows(ImageFinder(tmp_path / "out")).any()

    def shown(rows: Rows, number: int, folder: Path) -> list[tuple[bool, bytes]]:
        files = [rows[number].find(image, ImageFinder(folder)) for image in rows[number].image]
        return [
            (isinstance(file, Video), read_image(file.file if isinstance(file, Video) else file))
            for file in files
        ]

    for number in range(len(rows)):
        assert shown(again, number, tmp_path / "out") == shown(rows, number, tmp_path)
        assert again[number].turns == rows[number].turns
    assert [is_video for is_video, _ in shown(again, 0, tmp_path / "out")] == [True, False, True]
    [*_, last] = again[3].image
    assert last.name.endswith({"llava": ".film", "parquet": "film", "webdataset": ".mp4"}[form])


def test_a_video_of_several_rows_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    animation(tmp_path / "a.gif")
    rows = write(tmp_path, *(row("<video>", video="a.gif") | {"id": str(n)} for n in range(3)))
    decoded: list[Video] = []
    monkeypatch.setattr(images, "decode_video", lambda video: decoded.append(video) or DecodedImage("torn"))
    report = check([rows], ImageFinder(tmp_path))
    assert decoded == [Video(tmp_path / "a.gif")]
    assert [problem.kind for problem in report.problems] == ["picture unreadable"] * 3


def test_checked_fixed_and_converted(tmp_path: Path) -> None:
    animation(tmp_path / "a.gif")
    (tmp_path / "broken.gif").write_bytes(b"GIF89a")
    Image.new("RGB", (8, 8)).save(tmp_path / "gone.png")  # a picture of the same stem is no video
    rows = write(
        tmp_path, row("<video>", video="a.gif") | {"id": "a"}, row("<image>", image="a.gif") | {"id": "b"},
        row("<video>", video="broken.gif") | {"id": "c"}, row("<video>", video="gone.mp4") | {"id": "d"},
    )  # fmt: skip
    finder = ImageFinder(tmp_path)
    report = check([rows], finder)
    problems = [(problem.id, problem.kind) for problem in report.problems]
    assert problems == [("c", "picture unreadable"), ("d", "picture missing")]
    assert "video 'gone.mp4' is not in" in report.problems[1].reason
    assert rows.bad_rows(finder).tolist() == [False, False, False, True]
    assert rows.contents.max_images(8) == 8 and rows.contents.max_images(1) == 1
    sets = rows.contents.image_sets
    assert sets[0] != sets[1]  # the same file as a video and as a picture
    fix(rows, finder, report, tmp_path / "fixed.jsonl")
    assert [read.image for read in Rows(tmp_path / "fixed.jsonl")] == [(Video("a.gif"),), ("a.gif",)]
    convert(Rows(tmp_path / "fixed.jsonl"), tmp_path / "out", "llava", finder)
    [video, _] = Rows(tmp_path / "out" / "rows.jsonl")
    assert video.image == (Video("images/a.gif"),)
    assert (tmp_path / "out" / "images" / "a.gif").read_bytes() == (tmp_path / "a.gif").read_bytes()
