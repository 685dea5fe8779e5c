"""`pumice data show`: which template and which tokenizer, and what stands before everything."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pumice.boxes import COLOURS
from pumice.cli.data import app
from pumice.cli.data_show import _draw
from pumice.config import ChatFormat, DecoderConfig, ImagePolicy, ModelConfig, VisionConfig
from pumice.data.rows import ImageFinder, Rows
from pumice.errors import InputError
from pumice.formats.text.tokenizer import read_tokenizer

ROW = {
    "id": "r", "image": "x.jpg",
    "conversations": [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}],
}  # fmt: skip
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
ASK = "{% if add_generation_prompt %}assistant:{% endif %}"


def show(tokenizer: Path, template: str = "own") -> tuple[str, list[int]]:
    """The text of the only row, the learned part in [], and its ids."""
    rows = tokenizer.parent / "rows.json"
    rows.write_text(json.dumps([ROW]))
    arguments = ["show", str(rows), "--template", template, "--tokenizer", str(tokenizer), "--json"]
    (shown,) = json.loads(CliRunner().invoke(app, arguments, catch_exceptions=False).stdout)
    backend = read_tokenizer(tokenizer).backend
    text, learned = "", False
    for number, label in zip(shown["input_ids"], shown["labels"], strict=True):
        text += "[" if label != -100 and not learned else "]" if label == -100 and learned else ""
        learned = label != -100
        text += "*" if number == -200 else backend.id_to_token(number)
    return text + "]" * learned, shown["input_ids"]


@pytest.fixture
def folder(sentencepiece_file: Path, tmp_path: Path) -> Path:
    inner = tmp_path / "model"
    inner.mkdir()
    (inner / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
    return inner


def write(folder: Path, file: str, values: dict[str, Any]) -> None:
    (folder / file).write_text(json.dumps(values))


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_tokenizers_own_format(folder: Path, adds_bos: bool) -> None:
    """It writes its begin of text itself, whatever the tokenizer does."""
    write(folder, "tokenizer_config.json", {"chat_template": TEMPLATE + ASK, "add_bos_token": adds_bos})
    assert show(folder)[0] == "<s>▁user:*▁<0x0A>Q</s>▁assistant:[▁A</s>]".replace(":[▁A", ":[A")


def test_begin_of_text_is_the_tokenizers_habit_under_a_known_format(folder: Path) -> None:
    assert show(folder, "mistral_instruct")[0].startswith("<s>▁[INST]▁*▁<0x0A>Q▁[/INST][▁A▁</s>]")
    write(folder, "tokenizer_config.json", {"add_bos_token": False})
    assert show(folder, "mistral_instruct")[0].startswith("▁[INST]▁*▁<0x0A>Q▁[/INST][▁A▁</s>]")


def test_one_of_our_models_says_its_own(folder: Path) -> None:
    decoder = DecoderConfig(vocab_size=8, width=8, depth=1, heads=1, kv_heads=1, head_dim=8, mlp_width=8)
    chat = ChatFormat(user=("(", ")"), assistant="", stop="</s>", specials=("</s>",))
    config = ModelConfig(decoder=decoder, template="own", chat=chat)
    read_tokenizer(folder).backend.save(str(folder / "tokenizer.json"))
    write(folder, "config.json", config.to_dict())
    assert show(folder)[0] == "▁(*▁<0x0A>Q)[A</s>]"
    write(folder, "config.json", {**config.to_dict(), "bos_token_id": 1, "template": "mistral_instruct"})
    assert show(folder) == show(folder, "mistral_instruct")
    assert show(folder)[1][0] == 1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("own", "has no chat template; name its format with --template, one of: "),
        ("chatml", r"the tokenizer has no token '<\|im_start\|>', which the template needs"),
        ("vicuna", "unknown template 'vicuna'; did you mean 'vicuna_v1'"),
    ],
)
def test_what_does_not_fit_is_refused(folder: Path, template: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        show(folder, template)


ASKS, TELLS = "<image>\nWhere is <ref-object>?", "A dog at [0.25, 0.50, 0.75, 0.75]."
BOXED = {
    "id": "boxed",
    "image": "cat.png",
    "conversations": [{"from": "human", "value": ASKS}, {"from": "gpt", "value": "<bbox>"}],
    "objects": {"ref": ["the cat"], "bbox": [[16, 10, 48, 40]], "bbox_type": "real"},
}
TOLD = {
    "id": "told",
    "image": "cat.png",
    "conversations": [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": TELLS}],
}
BAD = {**BOXED, "id": "bad", "objects": {"ref": ["it"], "bbox": [[16, 10, 99, 40]], "bbox_type": "real"}}


def test_boxes_are_drawn_and_written(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture of 64 x 40: in the square of 64 it begins at 12."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 40)).save("cat.png")
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, (BOXED, TOLD))))
    arguments = ["show", "rows.jsonl", "--model", str(tiny_folder), "--images", "."]
    shown = CliRunner().invoke(app, [*arguments, "--pictures"], catch_exceptions=False).stdout
    assert "Where is the cat?" in shown and "[+[0.25, 0.34, 0.75, 0.81]" in shown
    assert "■ the cat [16, 10, 48, 40]" in shown
    assert "■ A dog [16, 20, 48, 36]" in shown  # LLaVA's rows: 0.5 of 64 less 12
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, (BOXED, TOLD, BAD))))
    CliRunner().invoke(app, ["show", "rows.jsonl", "--html", "page.html"], catch_exceptions=False)
    page = Path("page.html").read_text()
    assert "Where is the cat?" in page and "[0.25, 0.34, 0.75, 0.81]" in page
    assert "the box [16, 10, 99, 40] reaches out of its picture of 64 x 40" in page
    reds = []
    for data in re.findall(r"base64,([^\"]+)", page):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), int)
        reds.append([abs(pixels[row, 16:48] - COLOURS[0]).mean() < 60 for row in (39, 35)])
    # The lower edges of both boxes; black is 113 away, and JPEG blurs.
    assert reds == [[True, False], [False, True], [False, False]]


def test_boxes_of_a_row_of_two_pictures_are_read_as_the_model_sees_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In pixels of the square of 56 as which two pictures are shown; one alone is cut into tiles of it."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (112, 56)).save("wide.png")
    turns = [
        {"from": "human", "value": "<image>\n<image>\nWhere?"},
        {"from": "gpt", "value": "[14, 28, 28, 42]"},
    ]
    Path("rows.jsonl").write_text(json.dumps({"image": ["wide.png"] * 2, "conversations": turns}))
    [row] = Rows("rows.jsonl")
    decoder = DecoderConfig(vocab_size=8, width=8, depth=1, heads=1, kv_heads=1, head_dim=8, mlp_width=8)
    vision = VisionConfig("clip", 56, 32, 14, depth=2, heads=2, mlp_width=64)
    policy = ImagePolicy("anyres", pinpoints=((112, 56),), several="square")
    _draw(row, ImageFinder("."), ModelConfig(decoder, vision, image=policy, boxes="pixels"))
    assert "■ box [28, 28, 56, 56]" in capsys.readouterr().out


def test_frames_of_a_video_are_drawn(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each frame is a picture, and one row's boxes do not go to another's frames."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 40)).save("cat.png")
    frames = [Image.new("RGB", (64, 40), (shade, 0, 0)) for shade in (90, 180, 250)]
    frames[0].save("a.gif", save_all=True, append_images=frames[1:], duration=100)
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    rows = [BOXED, {"id": "film", "video": "a.gif", "conversations": turns}]
    rows.append({**rows[1], "id": "gone", "video": "b.gif"})
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    CliRunner().invoke(app, ["show", "rows.jsonl", "--html", "page.html"], catch_exceptions=False)
    page = Path("page.html").read_text()
    assert len(re.findall(r"base64,", page)) == 4
    assert "video &#39;b.gif&#39; is not in" in page and "[0.25, 0.34, 0.75, 0.81]" in page
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows[:2])))
    arguments = ["show", "rows.jsonl", "--model", str(tiny_folder), "--pictures"]
    shown = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout
    lines = [line for line in shown.splitlines() if "▀" in line]
    assert len(lines) == 4 * 12 and shown.count("■") == 1


def test_boxes_need_their_pictures(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps(BOXED))
    with pytest.raises(InputError, match=r"picture 'cat\.png' is not in '\.'; fetch it or name its folder"):
        CliRunner().invoke(app, ["show", "rows.jsonl", "--model", str(tiny_folder)], catch_exceptions=False)
