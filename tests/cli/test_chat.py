"""`pumice chat`: through a pipe and at a keyboard, where nothing typed is ever lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pumice.assistant import Assistant, load
from pumice.conversation import Video, from_llava

SHORT = ["--max-new-tokens", "8"]


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


def test_chat_shows_videos(
    run: Any, folder: Path, clip: str, tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also beside pictures, and in later turns, where those before stay; a file may go once it was read."""
    typed = [
        "What?", "/image cat.png clip.gif", "/video clip.gif", "Who?", "/video cat.png", "/video",
        "/save talk.json", "/video clip.gif", "/remove", "/remove",
    ]  # fmt: skip
    result = run("chat", clip, "--frames", "2", *SHORT, stdin="\n".join(typed) + "\n")
    assert result.exit_code == 0
    errors = result.stderr.splitlines()
    assert caplog.text.count("was not trained on videos") == 1
    assert "Removed: clip.gif\nNothing waits for your next question.\n" in result.stdout
    assert len(errors) == 2 and "'cat.png' is a single picture; show it with /image" in errors[0]
    assert "/video needs a path; write for example: /video clip.mp4" in errors[1]
    (talk,) = json.loads((folder / "talk.json").read_text())
    assert (talk["image"], talk["video"]) == (["cat.png"], ["clip.gif"] * 3)
    spoken = [(turn["from"], turn["value"]) for turn in talk["conversations"]]
    assert [text for speaker, text in spoken if speaker == "human"] == [
        "<video>\nWhat?", "<image><video><video>Who?",
    ]  # fmt: skip
    assistant = load(tiny_folder, device="cpu")
    video = Video(folder / clip, 2)
    assert spoken[1] == ("gpt", assistant.ask(video, "What?", max_new_tokens=8))
    shown = [video, folder / "cat.png", video, video]
    turns = [(speaker, text.replace("<video>", "<image>")) for speaker, text in spoken[:3]]
    conversation = from_llava("talk", turns, shown)
    assert spoken[3] == ("gpt", "".join(assistant.stream(conversation, max_new_tokens=8)))
    # Without --frames, an animation is a picture for /image.
    typed = ["/image clip.gif", "/video clip.gif", "Who?", "/save second.json"]
    assert run("chat", *SHORT, stdin="\n".join(typed) + "\n").exit_code == 0
    (second,) = json.loads((folder / "second.json").read_text())
    assert (second["image"], second["video"]) == (["clip.gif"], ["clip.gif"])


def test_chat_with_a_video_that_cannot_be_read(run: Any, refused: Any, folder: Path) -> None:
    (folder / "torn.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(40))
    refused(run("chat", "torn.mp4", stdin="What?\n"), "torn.mp4 ")
    refused(run("chat", "x" * 300 + ".mp4", stdin="What?\n"), "File name too long; check the path")
    result = run("chat", *SHORT, stdin="/image torn.mp4\nWhat?\n")
    assert result.exit_code == 0 and "torn.mp4 " in result.stderr and result.stdout.strip()


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
        "/save",
        "/image cat.png",
        "<image> and <image>?",
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
    parts += ["nothing to save", "/save needs a file", "2 <image> placeholders for 1 picture"]
    parts += ["context is 256", "'text.jpg' exists already", "'no/talk.json' cannot be written"]
    assert len(errors) == len(parts), errors
    assert all(part in error for part, error in zip(parts, errors, strict=True)), errors
    (talk,) = json.loads((bad_pictures / "talk.json").read_text())
    assert talk["image"] == ["cat.png"]
    assert talk["conversations"][0]["value"] == "<image>\nWhat?"


def test_chat_with_a_picture_that_cannot_be_read(run: Any, refused: Any, folder: Path) -> None:
    refused(run("chat", "no.png", stdin="What?\n"), "'no.png' does not exist")


def test_an_error_without_a_text_is_named(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(*_: Any, **__: Any) -> Iterator[str]:
        raise MemoryError

    monkeypatch.setattr(Assistant, "stream", stream)
    result = run("chat", stdin="What?\n/reset\n")
    assert (result.exit_code, result.stderr) == (0, "pumice: MemoryError\n")
    assert "A new conversation" in result.stdout


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(
    run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def stream(messages: Any) -> Iterator[str]:
        asked.append(messages[-1].text)
        if asked[-1] == "nothing":
            raise KeyboardInterrupt
        yield "Half an "
        if asked[-1] == "half":
            raise KeyboardInterrupt
        yield "answer."

    class Pieces:
        """The part of a Reply that is used."""

        def __init__(self, messages: Any, **_: Any) -> None:
            self.pieces = stream(messages)

        def __iter__(self) -> Iterator[str]:
            return self.pieces

    monkeypatch.setattr(Assistant, "stream", Pieces)
    result = run("chat", "cat.png", stdin="nothing\nhalf\nwhole\n/save talk.json\n")
    assert (result.exit_code, asked) == (0, ["nothing", "half", "whole"])
    (talk,) = json.loads((folder / "talk.json").read_text())
    turns = [turn["value"] for turn in talk["conversations"]]
    assert turns == ["<image>\nhalf", "Half an ", "whole", "Half an answer."]


class Terminal:
    """`pumice chat` at a pseudo-terminal, typed at and read as a person would."""

    def __init__(self, *arguments: str) -> None:
        import pty

        self.end, child_end = pty.openpty()
        command = [sys.executable, "-m", "pumice", "chat", *arguments]
        streams = {"stdin": child_end, "stdout": child_end, "stderr": child_end}
        self.child = subprocess.Popen(command, **streams, env=os.environ | {"TERM": "xterm"})
        os.close(child_end)
        self.unread = b""

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def expect(self, text: str) -> None:
        """Read up to and including `text`."""
        assert self.shows(text, 180), f"expected {text!r}, the terminal shows {self.unread!r}"

    def shows(self, text: str, seconds: float) -> bool:
        """Read up to and including `text`; return False if it does not come."""
        import select

        last = time.monotonic() + seconds
        while text.encode() not in self.unread:
            ready, _, _ = select.select([self.end], [], [], max(0.0, last - time.monotonic()))
            if not ready:
                return False
            self.unread += os.read(self.end, 4096)
        _, _, self.unread = self.unread.partition(text.encode())
        return True


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_at_a_keyboard_nothing_typed_is_lost(tiny_folder: Path, folder: Path) -> None:
    pytest.importorskip("readline")
    terminal = Terminal("cat.png", "--model", str(tiny_folder), "--device", "cpu", *SHORT)
    try:
        terminal.expect("[1 picture] > ")
        terminal.type("<image><image>What?\n")
        terminal.expect("2 <image> placeholders for 1 picture")
        terminal.expect("[1 picture] > <image><image>What?")
        terminal.type("\x01" + "\x04" * len("<image><image>") + "\n")  # to the beginning, delete, send
        terminal.expect("[1 picture] > ")
        terminal.type("half a line")
        terminal.expect("half a line")
        # readline misses a signal that comes between two keys, as no person's does.
        for _ in range(30):
            terminal.child.send_signal(signal.SIGINT)
            if terminal.shows("/quit or Ctrl-D leaves", 2):
                break
        else:
            pytest.fail(f"the terminal shows {terminal.unread!r}")
        terminal.expect("[1 picture] > ")
        terminal.type("\x1b[A")
        terminal.expect("half a line")
        terminal.type("\x15/save talk.json\n/quit\n")
        terminal.expect("Saved to talk.json")
        assert terminal.child.wait(timeout=180) == 0
    finally:
        terminal.child.kill()
        os.close(terminal.end)
    (talk,) = json.loads((folder / "talk.json").read_text())
    assert talk["conversations"][0]["value"] == "<image>\nWhat?"
