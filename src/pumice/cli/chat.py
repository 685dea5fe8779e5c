"""`pumice chat`: a conversation in the terminal, or through a pipe.

Knows commands, typed lines and what to do when something goes wrong: nothing typed is ever lost.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import unquote, urlparse

import typer

from pumice.cli import options
from pumice.conversation import IMAGE_PLACEHOLDER, Message, user_message
from pumice.errors import InputError
from pumice.files import replacing

if TYPE_CHECKING:
    from pumice.assistant import Assistant

HELP = """\
/image PATH...  show pictures with your next question (or drop files into the terminal)
/remove         take back the pictures that wait for your next question
/reset          begin a new conversation, without pictures
/save FILE      write the conversation as a LLaVA row, JSON
/help           these lines
/quit           leave (also Ctrl-D)
Ctrl-C stops an answer and keeps the conversation."""


def chat(
    images: Annotated[
        list[str] | None,
        typer.Argument(help="Pictures to begin with.", metavar="[IMAGE]...", show_default=False),
    ] = None,
    model: options.Model = "pumice-tiny",
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    repetition_penalty: options.RepetitionPenalty = None,
    stop: options.Stop = None,
    seed: options.Seed = None,
    device: options.Device = None,
    quantize: options.Quantize = options.Bits.auto,
    template: options.Template = None,
    tower: options.Tower = None,
    base: options.Base = None,
) -> None:
    """Talk about pictures in the terminal. /help lists what else can be typed."""
    from pumice.images import open_image

    for path in images or []:
        open_image(path)  # before torch is imported: a wrong path is told at once
    options.share_cores(waits_for_people=True)
    from pumice.assistant import load
    from pumice.engine.sampling import SamplingParams

    sampling = options.sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, stop, seed)
    SamplingParams(**sampling)
    if sys.stdin.isatty():
        print(f"Opening {model} ...", flush=True)
    opened = load(model, **options.opening(device, quantize, template, tower, base))
    Chat(opened, sampling, images or []).run()


class Chat:
    """One person's conversation.

    Pictures are kept as the bytes of their files, so that nobody can take them away while it lasts:
    `pending` go with the next question, `shown` are the names of those that went with earlier ones.
    """

    def __init__(self, assistant: Assistant, sampling: dict[str, Any], images: list[str]) -> None:
        self.assistant = assistant
        self.sampling = sampling
        self.messages: list[Message] = []
        self.pending: list[tuple[str, bytes]] = [(path, Path(path).read_bytes()) for path in images]
        self.shown: list[str] = []
        self.keyboard = sys.stdin.isatty()
        self.readline = _readline() if self.keyboard else None
        self.unsent = ""  # a question that got no answer: it stands in the next line again

    def run(self) -> None:
        """Read lines until the end of the input or /quit."""
        if self.keyboard:
            print("/help lists the commands.")
        self._show_pictures()
        while True:
            try:
                line = self._read().strip()
            except EOFError:
                if self.keyboard:
                    print()
                return
            except KeyboardInterrupt:
                self._keep_line()
                print("\n(/quit or Ctrl-D leaves)")
                continue
            if line in ("/quit", "/exit", "quit", "exit"):
                return
            try:
                self._obey(line)
            except InputError as error:
                print(f"pumice: {error}", file=sys.stderr)
            except (OSError, RuntimeError, MemoryError) as error:  # the conversation outlives them
                print(f"pumice: {error or type(error).__name__}", file=sys.stderr)

    def _obey(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if not line:
            return
        if command == "/image":
            self._add_pictures(rest)
        elif command == "/remove":
            self.pending = []
            self._show_pictures()
        elif command == "/reset":
            self.messages, self.pending, self.shown = [], [], []
            print("A new conversation, without pictures.")
        elif command == "/save":
            self._save(rest)
        elif command == "/help":
            print(HELP)
        elif dropped := _existing_files(line):
            self._add(dropped)
        elif command.startswith("/") and command.isascii() and command[1:].isalpha():
            raise InputError(f"there is no command {command!r}; /help lists them")
        else:
            self._ask(line)

    def _ask(self, question: str) -> None:
        self.unsent = question
        asked = user_message(question, [data for _, data in self.pending])
        text = ""
        try:
            for piece in self.assistant.stream([*self.messages, asked], **self.sampling):
                print(piece, end="", flush=True)
                text += piece
        except KeyboardInterrupt:
            print(" (stopped)", end="")
        finally:
            if text:
                print()
        if not text.strip():
            print("(no answer)")
            return
        self.messages += [asked, Message("assistant", (text,))]
        self.shown += [name for name, _ in self.pending]
        self.pending, self.unsent = [], ""

    def _add_pictures(self, rest: str) -> None:
        paths = _existing_files(rest)
        if not paths:
            if not rest.strip():
                raise InputError("/image needs a path; write for example: /image dog.jpg")
            paths = [_clean(rest)]  # opening it will say what is wrong with it
        self._add(paths)

    def _add(self, paths: list[str]) -> None:
        from pumice.images import open_image

        for path in paths:
            open_image(path)
        self.pending += [(path, Path(path).read_bytes()) for path in paths]
        self._show_pictures()

    def _show_pictures(self) -> None:
        if self.shown:
            print(f"In the conversation: {', '.join(self.shown)}")
        if self.pending:
            print(f"With your next question: {', '.join(name for name, _ in self.pending)}")

    def _save(self, rest: str) -> None:
        name = _clean(rest)
        if not name:
            raise InputError("/save needs a file; write for example: /save talk.json")
        if not self.messages:
            raise InputError("there is nothing to save yet; ask a question first")
        path = Path(name).expanduser()
        if path.exists():
            raise InputError(f"'{path}' exists already; name another file")
        turns = [
            {"from": "human" if message.role == "user" else "gpt", "value": _as_llava(message)}
            for message in self.messages
        ]
        pictures = {"image": self.shown} if self.shown else {}
        row = {"id": path.stem, **pictures, "conversations": turns}
        text = json.dumps([row], ensure_ascii=False, indent=1) + "\n"
        try:
            with replacing(path) as file:
                file.write(text)
        except OSError as error:
            raise InputError(f"'{path}' cannot be written: {error.strerror}; name another file") from error
        print(f"Saved to {path}")

    def _read(self) -> str:
        if not self.keyboard:
            return input()
        count = len(self.pending) + len(self.shown)
        with self._typed_before():
            return input(f"[{count} picture{'' if count == 1 else 's'}] > ")

    @contextlib.contextmanager
    def _typed_before(self) -> Iterator[None]:
        """Put the question that got no answer into the line, to be sent again or changed."""
        if self.readline is None or not self.unsent:
            yield
            return
        text, self.unsent = self.unsent, ""
        insert = self.readline.insert_text
        self.readline.set_startup_hook(lambda: insert(text))
        try:
            yield
        finally:
            self.readline.set_startup_hook()

    def _keep_line(self) -> None:
        """Ctrl-C while typing: the line is reached again with the up arrow."""
        if self.readline is not None and (line := self.readline.get_line_buffer()).strip():
            self.readline.add_history(line)


def _as_llava(message: Message) -> str:
    """A message with `<image>` where its pictures are; a new line follows a single one, as in LLaVA."""
    mark = IMAGE_PLACEHOLDER + "\n" * (len(message.images) == 1)
    return "".join(part if isinstance(part, str) else mark for part in message.parts)


def _readline() -> ModuleType | None:
    try:
        readline = import_module("readline")
    except ImportError:  # Windows
        return None
    readline.parse_and_bind("tab: complete")  # paths, where no other completer is set
    readline.set_completer(None)
    readline.set_completer_delims(" \t\n")
    return readline


def _clean(text: str) -> str:
    """A path as typed, quoted, or dropped by a file manager."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    if text.startswith("file://"):
        text = unquote(urlparse(text).path)
    return str(Path(text).expanduser()) if text else ""


def _existing_files(text: str) -> list[str]:
    """The files that a line names, spaces and quotes and all; [] unless every one exists."""
    candidates = [[_clean(text)]]
    with contextlib.suppress(ValueError):  # an odd quotation mark is no list of paths
        candidates.append([_clean(word) for word in shlex.split(text)])
    for paths in candidates:
        with contextlib.suppress(OSError, ValueError):  # a long question is no possible file name
            if paths and all(path and Path(path).is_file() for path in paths):
                return paths
    return []
