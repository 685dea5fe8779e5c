"""The command line: what it prints where, its exit statuses, and that nothing is written by halves."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pumice.assistant import Assistant, load
from pumice.cli import app
from pumice.conversation import from_llava
from pumice.processor import Processor

SHORT = ["--max-new-tokens", "8"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, the current one, with two pictures in it."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for name in ("a dog.png", "cat.png"):
        Image.fromarray(random.integers(0, 256, (40, 64, 3), np.uint8)).save(tmp_path / name)
    return tmp_path


@pytest.fixture
def run(tiny_folder: Path) -> Any:
    def run(*arguments: str, stdin: str | None = None, model: bool = True) -> Any:
        chosen = ["--model", str(tiny_folder), "--device", "cpu"] if model else []
        return CliRunner().invoke(app, [arguments[0], *chosen, *arguments[1:]], input=stdin)

    return run


def refused(result: Any, message: str) -> None:
    """Status 2, nothing on stdout, one line with the message on stderr."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.startswith("pumice: ")
    assert result.stderr.count("\n") == 1


def test_ask(run: Any, folder: Path, tiny_folder: Path) -> None:
    result = run("ask", "a dog.png", "cat.png", "What?", *SHORT)
    expected = load(tiny_folder, device="cpu").ask(["a dog.png", "cat.png"], "What?", max_new_tokens=8)
    assert (result.exit_code, result.stdout, result.stderr) == (0, expected + "\n", "")


def test_ask_without_a_picture(run: Any) -> None:
    result = run("ask", "What?", *SHORT)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.strip()


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


def test_sampling_options_reach_the_model(run: Any) -> None:
    drawn = [run("ask", "What?", *SHORT, "--temperature", "2", "--seed", s).stdout for s in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]
    free = run("ask", "What?", *SHORT).stdout[:-1]
    assert run("ask", "What?", *SHORT, "--stop", free[3:5]).stdout[:-1] == free[: free.index(free[3:5])]


@pytest.mark.parametrize(("word", "bits"), [("none", None), ("int8", "int8"), ("int4", "int4")])
def test_bits_reach_the_model(run: Any, tiny_folder: Path, word: str, bits: Any) -> None:
    expected = load(tiny_folder, device="cpu", quantize=bits).ask(None, "What?", max_new_tokens=8)
    assert run("ask", "What?", *SHORT, "--quantize", word).stdout == expected + "\n"
    assert run("ask", "What?", *SHORT, "--quantize", "int3").exit_code == 2


@pytest.fixture
def bad_pictures(folder: Path) -> Path:
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("this is no picture")
    whole = (folder / "cat.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    size = struct.pack(">II", 60000, 60000)
    (folder / "bomb.png").write_bytes(whole[:16] + size + whole[24:])
    (folder / "folder.jpg").mkdir()
    return folder


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
        (["<image>?"], "1 <image> placeholder for 0 pictures;"),
        (["<image>"], "1 <image> placeholder for 0 pictures;"),
        (["cat.png", "<image>"], "the question is empty"),
        (["What?", "--temperature", "-1"], "temperature is -1"),
        (["What?", "--top-p", "0"], "top_p is 0"),
        (["What?", "--device", "abacus"], "device 'abacus'"),
        (["What?", "--model", "pumice-huge"], "'pumice-huge'"),
        (["long " * 300], "context is 256"),
        (["What?", "--batch", "in.jsonl", "--out", "o.jsonl"], "leave out 'What?'"),
        (["--batch", "in.jsonl"], "--batch needs --out"),
        (["--out", "o.jsonl"], "--out belongs to --batch"),
        (["cat.png", "what", "is", "this"], "there is no picture 'what'; if it belongs to the question"),
        (["https://example.org/cat.png", "What?"], "is a web address; save the picture"),
        (["--batch", "missing.jsonl", "--out", "o.jsonl"], "'missing.jsonl' cannot be read"),
    ],
)
def test_wrong_input(run: Any, bad_pictures: Path, arguments: list[str], message: str) -> None:
    refused(run("ask", *arguments), message)


@pytest.mark.parametrize(
    "arguments", [["ask", "--no-such"], ["ask", "--seed", "x"], ["draw"], ["data", "show"]]
)
def test_wrong_usage_is_status_2(run: Any, arguments: list[str]) -> None:
    result = run(*arguments, model=False)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr


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
    assert result.stderr == "pumice: 8 of 13 rows have an error instead of an answer\n"
    answers = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    ids = ["beside", "here", "missing", 7, 5, 7, "text", "silent", "odd", "empty", "placeholders", 13, "typo"]
    assert [a["id"] for a in answers] == ids
    assert [set(a) - {"id"} for a in answers] == [
        {"error" if i in (2, 4, 5, 7, 8, 9, 10, 12) else "answer"} for i in range(13)
    ]
    for number, message in {
        2: "'no.png' does not exist",
        4: "line 5 is not JSON",
        10: "2 <image>",
        12: "write 'image'",
    }.items():
        assert message in answers[number]["error"]
    alone = load(tiny_folder, device="cpu").ask(None, "Who are\u2028you?", max_new_tokens=8)
    assert answers[6]["answer"] == alone
    assert sorted(p.name for p in folder.iterdir()) == ["a dog.png", "inside", "out.jsonl"]


def test_a_batch_without_a_single_answer_has_failed(run: Any, folder: Path) -> None:
    write_rows(folder / "in.jsonl", [{"id": 1, "image": "no.png", "question": "What?"}])
    result = run("ask", "--batch", "in.jsonl", "--out", "out.jsonl")
    assert (result.exit_code, (folder / "out.jsonl").exists()) == (1, True)


def test_batch_with_json(run: Any, folder: Path) -> None:
    write_rows(folder / "in.jsonl", [{"id": 1, "question": "What?"}, {"id": 2}])
    result = run("ask", "--batch", "in.jsonl", "--out", "out.jsonl", "--json", *SHORT)
    counts = json.loads(result.stdout)
    assert (counts["rows"], counts["answered"], counts["errors"], counts["out"]) == (2, 1, 1, "out.jsonl")
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("no/out.jsonl", "'no' of --out does not exist"),
        ("in.jsonl", "name another file"),
        (".", "name another"),
    ],
)
def test_batch_with_nowhere_to_write(run: Any, folder: Path, out: str, message: str) -> None:
    write_rows(folder / "in.jsonl", [{"id": 1, "question": "What?"}])
    refused(run("ask", "--batch", "in.jsonl", "--out", out), message)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_a_batch_that_was_stopped_goes_on(
    run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
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
    assert "1 of 3 answers stand in 'out.jsonl.partial' already" in result.stderr
    answers = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [a["id"] for a in answers] == ["broken", 0, 1, 2]
    assert answers[1]["answer"] == "an answer from before"
    assert sorted(p.name for p in folder.iterdir()) == ["a dog.png", "cat.png", "in.jsonl", "out.jsonl"]


def test_failed_work_is_status_1(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Iterator[str]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Assistant, "stream", full)
    result = run("ask", "What?")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "pumice: [Errno 28] No space left on device\n"


def test_chat(run: Any, folder: Path, tiny_folder: Path) -> None:
    typed = [
        "What?",
        "/image a dog.png",
        "/image 'cat.png' 'a dog.png'",
        "",
        "Who?",
        "/save talk.json",
        "/help",
        "/reset",
        f'"{folder / "cat.png"}"',
        f"file://{folder}/a%20dog.png",
        "Why?",
        "/save second.json",
        "/quit",
        "never said",
    ]
    result = run("chat", *SHORT, stdin="\n".join(typed) + "\n")
    assert (result.exit_code, result.stderr) == (0, "")
    (talk,) = json.loads((folder / "talk.json").read_text())
    assert talk["image"] == ["a dog.png", "cat.png", "a dog.png"]
    spoken = [(turn["from"], turn["value"]) for turn in talk["conversations"]]
    assert spoken[0] == ("human", "What?")
    assert spoken[2] == ("human", "<image><image><image>Who?")
    assistant = load(tiny_folder, device="cpu")
    assert spoken[1] == ("gpt", assistant.ask(None, "What?", max_new_tokens=8))
    conversation = from_llava("talk", spoken[:3], talk["image"])
    assert spoken[3] == ("gpt", "".join(assistant.stream(conversation, max_new_tokens=8)))
    (second,) = json.loads((folder / "second.json").read_text())
    assert second["image"] == [str(folder / "cat.png"), str(folder / "a dog.png")]
    assert len(second["conversations"]) == 2
    assert "With your next question: a dog.png, cat.png, a dog.png" in result.stdout
    assert "Ctrl-C" in result.stdout


def test_chat_begins_with_pictures_and_ends_with_its_input(run: Any, folder: Path) -> None:
    result = run("chat", "cat.png", *SHORT, stdin="What?\n/image cat.png\nWhat?")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("With your next question: cat.png\n")
    assert "In the conversation: cat.png\n" in result.stdout


def test_chat_goes_on_after_wrong_input(run: Any, bad_pictures: Path) -> None:
    typed = [
        "/image missing.jpg",
        "/image cut.png",
        "/image",
        "/dance",
        "/save talk.json",
        "<image> and <image>?",
        "/save",
        "/image cat.png",
        "long " * 300,
        "What?",
        "/save text.jpg",
        "/save no/talk.json",
        "/save talk.json",
    ]
    result = run("chat", *SHORT, stdin="\n".join(typed) + "\n")
    assert result.exit_code == 0
    errors = result.stderr.splitlines()
    parts = ["'missing.jpg' does not exist", "'cut.png' is truncated", "needs a path", "no command '/dance'"]
    parts += ["nothing to save", "2 <image> placeholders for 0 pictures", "/save needs a file"]
    parts += ["context is 256", "'text.jpg' exists already", "'no/talk.json' cannot be written"]
    assert len(errors) == len(parts), errors
    assert all(part in error for part, error in zip(parts, errors, strict=True)), errors
    (talk,) = json.loads((bad_pictures / "talk.json").read_text())
    assert talk["image"] == ["cat.png"]
    assert talk["conversations"][0]["value"] == "<image>\nWhat?"


def test_chat_with_a_picture_that_cannot_be_read(run: Any, folder: Path) -> None:
    refused(run("chat", "no.png", stdin="What?\n"), "'no.png' does not exist")


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(
    run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def stream(_: Assistant, messages: Any, **__: Any) -> Iterator[str]:
        asked.append(messages[-1].text)
        if asked[-1] == "nothing":
            raise KeyboardInterrupt
        yield "Half an "
        if asked[-1] == "half":
            raise KeyboardInterrupt
        yield "answer."

    monkeypatch.setattr(Assistant, "stream", stream)
    result = run("chat", "cat.png", stdin="nothing\nhalf\nwhole\n/save talk.json\n")
    assert (result.exit_code, asked) == (0, ["nothing", "half", "whole"])
    (talk,) = json.loads((folder / "talk.json").read_text())
    turns = [turn["value"] for turn in talk["conversations"]]
    assert turns == ["<image>\nhalf", "Half an ", "whole", "Half an answer."]


class Terminal:
    """`pumice chat` at a pseudo-terminal, typed at and read as a person would."""

    def __init__(self, *arguments: str) -> None:
        import pty

        self.end, theirs = pty.openpty()
        command = [sys.executable, "-m", "pumice", "chat", *arguments]
        self.child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        self.unread = b""

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def expect(self, wanted: str) -> None:
        """Read up to and including `wanted`."""
        import select

        last = time.monotonic() + 60
        while wanted.encode() not in self.unread:
            ready, _, _ = select.select([self.end], [], [], max(0.0, last - time.monotonic()))
            assert ready, f"expected {wanted!r}, the terminal shows {self.unread!r}"
            self.unread += os.read(self.end, 4096)
        _, _, self.unread = self.unread.partition(wanted.encode())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_at_a_keyboard_nothing_typed_is_lost(tiny_folder: Path, folder: Path) -> None:
    pytest.importorskip("readline")
    terminal = Terminal("--model", str(tiny_folder), "--device", "cpu", *SHORT)
    try:
        terminal.expect("[0 pictures] > ")
        terminal.type("<image>What?\n")
        terminal.expect("1 <image> placeholder for 0 pictures")
        terminal.expect("[0 pictures] > <image>What?")
        terminal.type("\x01" + "\x04" * len("<image>") + "\n")  # to the beginning, delete, send
        terminal.expect("[0 pictures] > ")
        terminal.type("half a line")
        terminal.expect("half a line")
        terminal.child.send_signal(signal.SIGINT)
        terminal.expect("/quit or Ctrl-D leaves")
        terminal.expect("[0 pictures] > ")
        terminal.type("\x1b[A")
        terminal.expect("half a line")
        terminal.type("\x15/save talk.json\n/quit\n")
        terminal.expect("Saved to talk.json")
        assert terminal.child.wait(timeout=30) == 0
    finally:
        terminal.child.kill()
        os.close(terminal.end)
    (talk,) = json.loads((folder / "talk.json").read_text())
    assert talk["conversations"][0]["value"] == "What?"


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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "[]\n")


ROWS = [
    {"id": "one", "image": "gone.jpg", "conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."},
        {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]},
    {"id": "two", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello 漢"}]},
]  # fmt: skip


@pytest.mark.parametrize("template", ["chatml", "plain"])
def test_data_show_json(run: Any, folder: Path, tiny_folder: Path, template: str) -> None:
    (folder / "rows.json").write_text(json.dumps(ROWS))
    arguments = ["rows.json", "--template", template, "--tokenizer", str(tiny_folder), "--json"]
    result = run("data", "show", *arguments, model=False)
    assert (result.exit_code, result.stderr) == (0, "")
    shown = json.loads(result.stdout)
    assistant = load(tiny_folder, device="cpu")
    import dataclasses

    config = dataclasses.replace(assistant.processor.config, template=template)
    processor = Processor(config, assistant.processor.tokenizer)
    for row, found in zip(ROWS, shown, strict=True):
        turns = [(t["from"], t["value"]) for t in row["conversations"]]
        images = [row["image"]] if "image" in row else []
        sample = processor.training_sample(from_llava(row["id"], turns, images))
        # ours holds one placeholder per picture, a sample one per image token
        ids = [
            n for i, n in enumerate(sample.input_ids.tolist()) if n != -200 or sample.input_ids[i - 1] != -200
        ]
        assert found["id"] == row["id"]
        assert found["input_ids"] == ids
        learned = [n for n in found["labels"] if n != -100]
        assert learned == [n for n in sample.labels.tolist() if n != -100]
        assert len(found["labels"]) == len(ids)


def test_data_show_in_words(run: Any, folder: Path, tiny_folder: Path) -> None:
    (folder / "rows.json").write_text(json.dumps(ROWS))
    arguments = ["rows.json", "--template", "chatml", "--tokenizer", str(tiny_folder / "tokenizer.json")]
    result = run("data", "show", *arguments, "--rows", "1", model=False)
    assert result.exit_code == 0, result.output
    first, rest = result.stdout.split("\n", 1)
    assert first.startswith("one: ") and first.endswith(" supervised")
    assert rest.strip() == (
        "<|im_start|>user\n[image]\nWhat?<|im_end|>\n<|im_start|>assistant\n[+A dog.<|im_end|>+]\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n[+Yes.<|im_end|>+]"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rows.json", "--template", "chat-ml", "--tokenizer", "TOKENIZER"], "did you mean 'chatml'"),
        (["rows.json", "--template", "plain", "--tokenizer", "no.json"], "there is no tokenizer at no.json"),
        (["rows.json", "--template", "plain", "--tokenizer", "."], "there is no tokenizer at"),
        (["rows.json", "--template", "plain", "--tokenizer", "rows.json"], "is not a tokenizer.json"),
        (["no.json", "--template", "plain", "--tokenizer", "TOKENIZER"], "'no.json' cannot be read"),
        (["rows.json", "--template", "plain", "--tokenizer", "TOKENIZER", "--images", "."], "'gone.jpg'"),
    ],
)
def test_data_show_wrong_input(
    run: Any, folder: Path, tiny_folder: Path, arguments: list[str], message: str
) -> None:
    (folder / "rows.json").write_text(json.dumps(ROWS))
    named = [str(tiny_folder) if a == "TOKENIZER" else a for a in arguments]
    refused(run("data", "show", *named, "--json", model=False), message)


def test_data_check(run: Any, folder: Path) -> None:
    rows = [dict(ROWS[0], image="cat.png"), ROWS[1]]
    (folder / "rows.json").write_text(json.dumps(rows))
    result = run("data", "check", "rows.json", "--images", ".", model=False)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "2 of 2 rows can be used\n", "")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    result = run("data", "check", "rows.json", "--images", ".", model=False)
    assert result.exit_code == 1
    assert result.stdout.startswith("row 1 (one): picture missing: ")
    assert result.stdout.endswith("1 of 2 rows can be used\n")
    result = run("data", "check", "rows.json", "--images", ".", "--json", "--budget", "0.5", model=False)
    assert (result.exit_code, json.loads(result.stdout)["usable"]) == (0, 1)
    refused(run("data", "check", "rows.json", "--images", "no", model=False), "'no' does not exist")


def test_train_passes_its_recipe_on(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import pumice.train

    seen: list[Any] = []
    monkeypatch.setattr(pumice.train, "run", lambda recipe, overrides: seen.append((recipe, overrides)))
    result = run("train", "recipe.yaml", "--set", "seed=1", "--set", "a.b=2", model=False)
    assert (result.exit_code, seen) == (0, [(Path("recipe.yaml"), ["seed=1", "a.b=2"])])


def test_a_missing_recipe(run: Any, folder: Path) -> None:
    refused(run("train", "no.yaml", model=False), "no.yaml")


def test_version() -> None:
    import pumice

    assert CliRunner().invoke(app, ["--version"]).stdout == f"pumice {pumice.__version__}\n"
