"""`pumice ask`: one answer, and what is wrong with a question."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops

from pumice.assistant import Assistant, load
from pumice.boxes import COLOURS
from pumice.cli import app
from pumice.cli.options import Opening
from pumice.conversation import Video
from pumice.engine import sizes
from pumice.engine.reply import Reply
from pumice.errors import InputError
from pumice.formats import read
from pumice.formats.export import export
from pumice.formats.pumice.quantized import copies_folder

SHORT = ["--max-new-tokens", "8"]


def test_ask(run: Any, folder: Path, tiny_folder: Path) -> None:
    result = run("ask", "a dog.png", "cat.png", "What?", *SHORT)
    expected = load(tiny_folder, device="cpu").ask(["a dog.png", "cat.png"], "What?", max_new_tokens=8)
    assert (result.exit_code, result.stdout, result.stderr) == (0, expected + "\n", "")


def test_the_boxes_of_an_answer_are_drawn_on_its_picture(
    run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pixels of the picture of 64 x 40, which the model writes as shares of the square of 64."""
    monkeypatch.setattr(Reply, "__iter__", lambda self: iter(("a dog [0.25, 0.5", "0, 0.75, 0.75], a sky")))
    plain = Image.open(folder / "cat.png").convert("RGB")
    result = run("ask", "a dog.png", "cat.png", "Where?", "--out", "out.png", *SHORT)
    assert (result.exit_code, result.stderr) == (0, "pumice: out.png shows the answer's boxes: 1\n")
    with Image.open(folder / "out.png") as drawn:
        assert drawn.size == (64, 40)
        changed = ImageChops.difference(drawn, plain).getbbox()
    # Rows 0.5 to 0.75 of the square are 20 to 36 of the picture. The label stands above.
    assert changed is not None and (changed[0], changed[3]) == (16, 36)
    assert np.asarray(Image.open(folder / "out.png"))[35, 16:48].tolist() == [list(COLOURS[0])] * 32
    monkeypatch.setattr(Reply, "__iter__", lambda self: iter(("A dog.",)))
    result = run("ask", "cat.png", "Where?", "--out", "out.jpg", "--json", *SHORT)
    assert result.stderr == "pumice: out.jpg shows the answer's boxes: 0\n"
    assert json.loads(result.stdout)["answer"] == "A dog."
    assert Image.open(folder / "out.jpg").format == "JPEG"


def test_ask_without_a_picture(run: Any) -> None:
    result = run("ask", "What?", *SHORT)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.strip()


def test_on_a_terminal_an_answer_about_no_picture_is_told(
    folder: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture may have been forgotten. Programs read no notes."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    note = "pumice: no picture is shown, so the answer is about none\n"
    for words, told in ((["What?"], note), (["What?", "--json"], ""), (["cat.png", "What?"], "")):
        app(["ask", "--model", str(tiny_folder), "--device", "cpu", *words, *SHORT], standalone_mode=False)
        assert capsys.readouterr().err == told


def test_without_memory_for_the_cache_the_reason_is_one_sentence(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "available_memory", lambda: sizes.RESERVE / 2)
    result = run("ask", "What?", *SHORT)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("pumice: no memory is left for the KV cache; close other programs")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        ["ask", "cat.png", "What?"],
        ["chat", "cat.png"],
        ["explain", "cat.png", "What?", "--out", "page.html"],
    ],
)
def test_options_are_checked_before_the_model_is_opened(
    run: Any, refused: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was opened first")

    monkeypatch.setattr("pumice.assistant.load", opened)
    refused(run(*command, "--max-new-tokens", "0"), "max_new_tokens is 0")
    refused(run(*command, "--temperature", "-1"), "temperature is -1.0")


@pytest.mark.parametrize(
    "arguments", [["What?"], ["cat.png", "What?"], ["--batch", "in.jsonl", "--out", "out.jsonl"]]
)
def test_frames_are_not_left_out_without_a_word(
    run: Any, refused: Any, folder: Path, arguments: list[str]
) -> None:
    (folder / "in.jsonl").write_text('{"image": "cat.png", "question": "What?"}\n')
    message = "--frames is for a video or an animation, and none is shown"
    refused(run("ask", "--frames", "4", *arguments), message)


def test_slots_are_not_left_out_without_a_word(run: Any, refused: Any) -> None:
    refused(run("ask", "--slots", "4", "What?"), "--slots is for the questions of --batch")


@pytest.mark.parametrize("pictures", [[], ["cat.png"]])
def test_the_word_image_is_asked_about(
    run: Any, folder: Path, tiny_folder: Path, pictures: list[str]
) -> None:
    question = "What does <image> mean?"
    result = run("ask", *pictures, question, *SHORT)
    expected = load(tiny_folder, device="cpu").ask(pictures, question, max_new_tokens=8)
    assert (result.exit_code, result.stdout, result.stderr) == (0, expected + "\n", "")


def test_a_model_of_others_takes_its_template(run: Any, folder: Path, models: ModuleType) -> None:
    export(models.tiny(models.ARCHITECTURES["CLIP + Llama, pad (LLaVA 1.5)"]), "llava", folder / "llava")
    asked = ["ask", "cat.png", "What?", *SHORT, "--model", str(folder / "llava"), "--device", "cpu"]
    v0, v1, usual = (
        run(*asked, *more, model=False).stdout for more in (["--template", "v0"], ["--template", "v1"], [])
    )
    assert v0 != v1 == usual
    expected = load(folder / "llava", device="cpu", template="v0").ask("cat.png", "What?", max_new_tokens=8)
    assert v0 == expected + "\n"


@pytest.mark.parametrize(
    "command", [["ask", "cat.png", "What?"], ["explain", "cat.png", "What?", "--json"], ["chat", "cat.png"]]
)
def test_a_language_model_alone_is_refused_before_it_is_converted(
    run: Any,
    refused: Any,
    folder: Path,
    models: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
) -> None:
    monkeypatch.setenv("PUMICE_CACHE", str(folder / "cache"))
    export(models.tiny(models.ARCHITECTURES["SigLIP + Qwen2, squash"]), "gguf", folder / "pair", kind="q8_0")
    alone = (folder / "pair" / "model-q8_0.gguf").rename(folder / "alone.gguf")
    options = ["--model", str(alone), "--device", "cpu", "--quantize", "int8"]
    result = run(*command, *options, model=False)
    refused(result, "this model is a language model without a vision tower; ask it without pictures")
    assert not copies_folder().exists()
    if command[0] == "ask":
        assert run("ask", "What?", *options, *SHORT, model=False).exit_code == 0
        assert copies_folder().exists()


def test_json_is_one_object(run: Any, folder: Path, tiny_folder: Path) -> None:
    result = run("ask", "cat.png", "What?", "--json", *SHORT)
    values = json.loads(result.stdout)
    plain = run("ask", "cat.png", "What?", *SHORT).stdout
    assert values == {
        "model": str(tiny_folder),
        "images": ["cat.png"],
        "question": "What?",
        "answer": plain[:-1],
        "finish": "length",
        "tokens": 8,
    }
    assert result.stderr == ""


def test_a_trained_model_is_called_by_its_recipe(
    run: Any, folder: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = folder / "run" / "model"
    shutil.copytree(tiny_folder, trained)

    def called(name: str, stages: Any) -> str:
        (trained / "provenance.json").write_text(json.dumps({"stages": stages}))
        result = run("ask", "What?", "--json", *SHORT, "--model", name, model=False)
        return str(json.loads(result.stdout)["model"])

    stages = [{"recipe": {"name": "first"}}, {"recipe": {"name": "four albums"}}]
    assert called("run/model", stages) == "four albums"
    for odd in ([], [3], [{}], {"recipe": 1}, [{"recipe": {"name": ["x"]}}]):
        assert called("run/model", odd) == "run/model"
    trained.rename(folder / "run" / "rex")  # a name of the user's own
    trained = folder / "run" / "rex"
    assert called("run/rex", stages) == "run/rex"
    monkeypatch.chdir(trained.rename(folder / "run" / "model"))
    trained = Path()
    assert called(".", stages) == "four albums"


def test_sampling_options_reach_the_model(run: Any) -> None:
    drawn = [run("ask", "What?", *SHORT, "--temperature", "2", "--seed", s).stdout for s in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]
    free = run("ask", "What?", *SHORT).stdout[:-1]
    assert run("ask", "What?", *SHORT, "--stop", free[3:5]).stdout[:-1] == free[: free.index(free[3:5])]


def test_an_option_goes_before_what_the_model_s_folder_says(
    run: Any, penalising: Path, tiny_folder: Path
) -> None:
    plain, penalised = (
        load(folder, device="cpu").ask(None, "What?", max_new_tokens=8)
        for folder in (tiny_folder, penalising)
    )
    assert plain != penalised
    model = ["--model", str(penalising)]
    assert run("ask", "What?", *SHORT, *model).stdout == penalised + "\n"
    assert run("ask", "What?", *SHORT, *model, "--repetition-penalty", "1").stdout == plain + "\n"


def test_beams(run: Any, searching: Path, tiny_folder: Path, tmp_path: Path) -> None:
    tiny = load(tiny_folder, device="cpu")
    greedy = tiny.ask(None, "What?", max_new_tokens=8)
    best = tiny.ask(None, "What?", max_new_tokens=8, num_beams=3, length_penalty=0.5)
    assert best != greedy
    model = ["--model", str(searching)]
    assert run("ask", "What?", *SHORT, *model).stdout == best + "\n"
    assert run("ask", "What?", *SHORT, "--num-beams", "3", "--length-penalty", "0.5").stdout == best + "\n"
    assert run("ask", "What?", *SHORT, *model, "--num-beams", "1").stdout == greedy + "\n"
    assert run("ask", "What?", *SHORT, *model, "--temperature", "0").stdout == best + "\n"
    refused = run("ask", "What?", *SHORT, "--num-beams", "3", "--temperature", "1")
    assert (refused.exit_code, "num_beams is 3, which does not go with temperature" in refused.stderr) == (
        2,
        True,
    )
    drawn = ("--temperature", "1", "--top-p", "0.9", "--seed", "3")
    expected = tiny.ask(None, "What?", max_new_tokens=8, temperature=1.0, top_p=0.9, seed=3)
    assert run("ask", "What?", *SHORT, *model, *drawn).stdout == expected + "\n"
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "What?"}\n' * 2)
    batch = ["--batch", str(rows), "--out", str(tmp_path / "out.jsonl"), *SHORT, *model]
    for more, answer in ((), best), (("--repetition-penalty", "1.0"), best), (("--num-beams", "1"), greedy):
        assert run("ask", *batch, *more).exit_code == 0
        answers = [json.loads(line)["answer"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert answers == [answer] * 2
        (tmp_path / "out.jsonl").unlink()


@pytest.mark.parametrize("command", [("ask", "What?"), ("chat",)])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num-beams 3 --top-p 0.9", "top_p does nothing where no word is drawn"),
        ("--top-k 5 --min-p 0.1", "top_k and min_p do nothing where no word is drawn; give a temperature"),
        ("--length-penalty 0.5", "length_penalty is 0.5, which does nothing without beams"),
        ("--num-beams 100", "num_beams is 100; give 1 (off) to 64"),
        ("--length-penalty nan", "length_penalty is nan; give a number"),
        ("--temperature -1", "temperature is -1.0; give 0 (greedy) or more"),
    ],
)
def test_options_that_would_do_nothing_are_refused_before_the_model_is_opened(
    run: Any,
    refused: Any,
    command: tuple[str, ...],
    words: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Opening, "load", None)
    refused(run(*command, *words.split()), message)


def test_the_model_s_folder_says_what_does_nothing(
    run: Any, refused: Any, searching: Path, drawing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("--top-p", "0.9", "--top-k", "2")
    assert run("ask", "What?", *SHORT, "--model", str(drawing), *given, model=False).exit_code == 0
    assert run("ask", "What?", *SHORT, "--model", str(searching), "--length-penalty", "2").exit_code == 0
    monkeypatch.setattr(read, "stored_generation", lambda _: None)  # as of a model on the hub
    refused(run("ask", "What?", *SHORT, *given), "top_p and top_k do nothing")
    with pytest.raises(InputError, match="top_p does nothing"):  # before `chat` waits for a question
        Opening(device="cpu").load_to_ask(str(searching), {"top_p": 0.9})


@pytest.mark.parametrize(("word", "bits"), [("none", None), ("int8", "int8"), ("int4", "int4")])
def test_bits_reach_the_model(run: Any, tiny_folder: Path, word: str, bits: Any) -> None:
    expected = load(tiny_folder, device="cpu", quantize=bits).ask(None, "What?", max_new_tokens=8)
    assert run("ask", "What?", *SHORT, "--quantize", word).stdout == expected + "\n"
    assert run("ask", "What?", *SHORT, "--quantize", "int3").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jpg", "What?"], "picture 'missing.jpg' does not exist"),
        (["empty.jpg", "What?"], "'empty.jpg' is empty"),
        (["text.jpg", "What?"], "'text.jpg' is not a picture"),
        (["cut.png", "What?"], "'cut.png' is truncated or damaged"),
        (["bomb.png", "What?"], "'bomb.png'"),
        (["folder.jpg", "What?"], "'folder.jpg' is a folder"),
        ([], "there is no question"),
        ([""], "there is no question"),
        (["cat.png", "  "], "there is no question"),
        (["cat.png"], "'cat.png' is a picture; write for example: pumice ask cat.png"),
        (["cat.png", "a dog.png"], "'a dog.png' is a picture"),
        (["other.jpeg"], "'other.jpeg' is a picture"),
        (["cat.png", "<image> <image>?"], "2 <image> placeholders for 1 picture;"),
        (["cat.png", "cat.png", "<image>?"], "1 <image> placeholder for 2 pictures;"),
        (["cat.png", "<image>"], "the question is empty"),
        (["What?", "--temperature", "-1"], "temperature is -1"),
        (["What?", "--top-p", "0"], "top_p is 0"),
        (["What?", "--device", "abacus"], "device 'abacus'"),
        (["What?", "--model", "pumice-huge"], "'pumice-huge'"),
        (["long " * 300], "context is 256"),
        (["What?", "--batch", "in.jsonl", "--out", "o.jsonl"], "leave out 'What?'"),
        (["--batch", "in.jsonl"], "--batch needs --out"),
        (["cat.png", "What?", "--out", "o.jsonl"], "a file of answers belongs to --batch IN.jsonl"),
        (["What?", "--out", "o.png"], "--out o.png draws the boxes of an answer on its picture; show one"),
        (["cat.png", "What?", "--out", "no/o.png"], "the folder 'no' of --out does not exist"),
        (["cat.png", "What?", "--out", "cat.png"], "--out 'cat.png' is a folder or the picture itself"),
        (
            ["cat.png", "what", "is", "this"],
            "there is no picture or video 'what'; if it belongs to the question",
        ),
        (["x" * 300, "What?"], "there is no picture or video"),
        (["x" * 300 + ".png", "What?"], "File name too long"),
        (["https://example.org/cat.png", "What?"], "is a web address; save the picture"),
        (["--batch", "missing.jsonl", "--out", "o.jsonl"], "'missing.jsonl' cannot be read"),
    ],
)
def test_wrong_input(run: Any, refused: Any, bad_pictures: Path, arguments: list[str], message: str) -> None:
    refused(run("ask", *arguments), message)


def test_ask_imports_nothing_heavy(tiny_folder: Path, folder: Path) -> None:
    code = f"""
import sys
from pumice.cli import app
sys.argv = ["pumice", "ask", "cat.png", "What?", "--model", {str(tiny_folder)!r}, "--max-new-tokens", "2"]
try:
    app()
finally:
    heavy = {{"transformers", "torchvision", "peft", "sympy", "scipy", "rich", "huggingface_hub"}}
    print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (0, "[]\n")


def test_an_option_out_of_range_is_told_before_torch_is_imported(tiny_folder: Path) -> None:
    code = f"""
import sys
from pumice.cli import app
sys.argv = ["pumice", "ask", "What?", "--model", {str(tiny_folder)!r}, "--num-beams", "100"]
try:
    app()
finally:
    print("torch" in sys.modules)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout) == (2, "False\n")


def test_wrong_videos(
    run: Any, refused: Any, folder: Path, clip: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = (folder / clip).read_bytes()
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "none.gif").write_bytes(whole[:20])
    (folder / "torn.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(40))
    frames = [Image.new("RGB", (8, 8), (2 * n, 0, 0)) for n in range(100)]
    frames[0].save(folder / "long.gif", save_all=True, append_images=frames[1:], duration=100)
    for name, count, words in (
        ("empty.mp4", "2", "'empty.mp4' is empty (0 bytes)"),
        ("none.gif", "2", "none.gif"),
        ("torn.mp4", "2", "torn.mp4 "),  # has no frame, or needs PyAV
        ("long.gif", "100", "of 100 frames fit: show fewer (--frames)"),
        ("cat.png", "2", "--frames is for a video or an animation, and none is shown"),
    ):
        refused(run("ask", name, "What?", "--frames", count, *SHORT), words)
    # A damaged end is left out and told; pictures and frames stand beside each other.
    (folder / "cut.gif").write_bytes(whole[: whole.rindex(b"\x21\xf9\x04")])
    result = run("ask", "cat.png", "cut.gif", "What?", "--frames", "3", *SHORT)
    assert result.exit_code == 0 and result.stdout.strip()
    assert "cut.gif is damaged after frame 3 (it does not end as a GIF does)" in caplog.text
    assert "on more than 1: answers may be poor" in caplog.text  # a picture and frames are several


def test_frames_are_of_animations_alone(
    run: Any, refused: Any, folder: Path, clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A still picture beside a video stays a picture, which may be cut into tiles."""
    Image.new("RGB", (20, 10)).save(folder / "still.gif")
    asked: list[Any] = []
    stream = Assistant.stream

    def recorded(self: Assistant, conversation: Any, **options: Any) -> Any:
        asked.extend(image.source for image in conversation.images)
        return stream(self, conversation, **options)

    monkeypatch.setattr(Assistant, "stream", recorded)
    result = run("ask", "cat.png", clip, "still.gif", "What?", "--frames", "2", *SHORT)
    assert result.exit_code == 0
    assert [isinstance(source, Video) for source in asked] == [False, True, False]
    assert asked[1] == Video(clip, 2)
    refused(run("ask", "cat.png", "still.gif", "What?", "--frames", "2"), "--frames is for a video or an")
