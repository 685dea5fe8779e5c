"""`pumice chat`: a conversation in the terminal, or through a pipe, in which no typed text is lost."""

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

from typer import Argument

from pumice.cli import options, reading
from pumice.errors import CAUSE, InputError, counted, wrong_input
from pumice.files import replacing

if TYPE_CHECKING:
    from pumice.assistant import Assistant
    from pumice.conversation import Message, Video

SAMPLING = options.Sampling(max_new_tokens=512)
HELP = """\
/image PATH...  show pictures or videos with your next question (or drop files into the terminal)
/video PATH...  show videos; an animated GIF or WebP is one here, but a picture for /image
/remove         take back the pictures and videos of your next question
/reset          begin a new conversation, without pictures
/save FILE      write the conversation as a LLaVA row, JSON
/help           these lines
/quit           leave (also Ctrl-D)
Ctrl-C stops an answer and keeps the conversation."""


@options.expand
def chat(
    images: Annotated[
        list[str] | None, Argument(help="Pictures or videos to begin with.", metavar="[IMAGE]...")
    ] = None,
    model: options.Model = "pumice-tiny",
    frames: options.VideoFrames = None,
    sampling: options.Sampling = SAMPLING,
    *,
    opening: options.Opening,
) -> None:
    """Talk about pictures in the terminal. /help lists what else can be typed."""
    files = [_read_file(path, frames) for path in images or []]  # before torch: a wrong path fails at once
    if sys.stdin.isatty():
        print(f"Opening {model} ...", flush=True)
    given = sampling.given()
    assistant = opening.load_to_ask(model, given, pictures=bool(files), shown=True, waits_for_people=True)
    Chat(assistant, given, files, frames).run()


class Chat:
    """One conversation.

    It holds each picture as the bytes of its file, and a video as its frames, so the file may change or go
    later. pending: (path, picture or video) for the next question. shown: those of earlier questions. frames:
    of each video; None: as the model was trained.
    """

    def __init__(
        self,
        assistant: Assistant,
        sampling: dict[str, Any],
        files: list[tuple[str, bytes | Video]],
        frames: int | None = None,
    ) -> None:
        self.assistant = assistant
        self.sampling = sampling
        self.messages: list[Message] = []
        self.frames = frames
        self.pending = [self._decoded(*file) for file in files]
        self.shown: list[tuple[str, bytes | Video]] = []
        self.interactive = sys.stdin.isatty()
        self.readline = _readline() if self.interactive else None
        self.unanswered = ""  # a question without an answer, which the next prompt shows again

    def run(self) -> None:
        """Read lines until the end of the input or /quit."""
        if self.interactive:
            print("/help lists the commands.")
        self._print_images()
        while True:
            try:
                line = self._read_line().strip()
            except EOFError:
                if self.interactive:
                    print()
                return
            except KeyboardInterrupt:
                self._add_line_to_history()
                print("\n(/quit or Ctrl-D leaves)")
                continue
            if line in ("/quit", "/exit", "quit", "exit"):
                return
            try:
                self._handle(line)
            except (InputError, OSError, RuntimeError, MemoryError) as error:  # the conversation continues
                print(f"pumice: {str(error) or type(error).__name__}", file=sys.stderr)

    def _handle(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if not line:
            return
        if command in ("/image", "/video"):
            self._add_images(command, argument)
        elif command == "/remove":
            removed = ", ".join(name for name, _ in self.pending)
            self.pending = []
            print(f"Removed: {removed}" if removed else "Nothing waits for your next question.")
        elif command == "/reset":
            self.messages, self.pending, self.shown = [], [], []
            print("A new conversation, without pictures.")
        elif command == "/save":
            self._save(argument)
        elif command == "/help":
            print(HELP)
        elif dropped := _existing_files(line):
            self._add_files(dropped)
        elif command.startswith("/") and command.isascii() and command[1:].isalpha():
            raise InputError(f"there is no command {command!r}; /help lists them")
        else:
            self._ask(line)

    def _ask(self, question: str) -> None:
        from pumice.conversation import Message, question_message

        self.unanswered = question
        message = question_message(question, [source for _, source in self.pending])
        text = ""
        try:
            reply = self.assistant.stream([*self.messages, message], **self.sampling)
            for piece in reading.pieces(reply):
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
        self.messages += [message, Message("assistant", (text,))]
        self.shown += self.pending
        self.pending, self.unanswered = [], ""

    def _add_images(self, command: str, argument: str) -> None:
        paths = _existing_files(argument)
        if not paths:
            if not argument.strip():
                example = {"/image": "dog.jpg", "/video": "clip.mp4"}[command]
                raise InputError(f"{command} needs a path; write for example: {command} {example}")
            paths = [_clean(argument)]  # reading it raises the error
        self._add_files(paths, as_videos=command == "/video")

    def _add_files(self, paths: list[str], as_videos: bool = False) -> None:
        files = [_read_file(path, self.frames, as_videos) for path in paths]
        self.pending += [self._decoded(*file) for file in files]
        self._print_images()

    def _decoded(self, name: str, source: bytes | Video) -> tuple[str, bytes | Video]:
        """Decode a video once, not with every question."""
        from pumice.conversation import Video
        from pumice.video import read_frames

        if isinstance(source, Video):
            return name, Video(read_frames(source, self.assistant.model.config.video))
        return name, source

    def _print_images(self) -> None:
        if self.shown:
            print(f"In the conversation: {', '.join(name for name, _ in self.shown)}")
        if self.pending:
            print(f"With your next question: {', '.join(name for name, _ in self.pending)}")

    def _save(self, argument: str) -> None:
        name = _clean(argument)
        if not name:
            raise InputError("/save needs a file; write for example: /save talk.json")
        if not self.messages:
            raise InputError("there is nothing to save yet; ask a question first")
        path = Path(name).expanduser()
        if path.exists():
            raise InputError(f"'{path}' exists already; name another file")
        row = self._row(path.stem)
        text = json.dumps([row], ensure_ascii=False, indent=1) + "\n"
        with (
            wrong_input(OSError, f"'{path}' cannot be written: {CAUSE}; name another file"),
            replacing(path) as file,
        ):
            file.write(text)
        print(f"Saved to {path}")

    def _row(self, row_id: str) -> dict[str, Any]:
        """Return the conversation as LLaVA writes it."""
        from pumice.conversation import Video

        media: dict[str, list[str]] = {}
        for name, source in self.shown:
            media.setdefault("video" if isinstance(source, Video) else "image", []).append(name)
        turns = [
            {"from": "human" if message.role == "user" else "gpt", "value": _as_llava(message)}
            for message in self.messages
        ]
        return {"id": row_id, **media, "conversations": turns}

    def _read_line(self) -> str:
        if not self.interactive:
            return input()
        with self._prefilled_prompt():
            return input(f"[{self._count()}] > ")

    def _count(self) -> str:
        """Return how many pictures the conversation shows, and videos, if any."""
        from pumice.conversation import Video

        sources = [source for _, source in (*self.shown, *self.pending)]
        videos = sum(isinstance(source, Video) for source in sources)
        count = counted(len(sources) - videos, "picture")
        return f"{count}, {counted(videos, 'video')}" if videos else count

    @contextlib.contextmanager
    def _prefilled_prompt(self) -> Iterator[None]:
        """Put the question without an answer into the prompt, so that it can be changed and sent again."""
        if self.readline is None or not self.unanswered:
            yield
            return
        text, self.unanswered = self.unanswered, ""
        insert = self.readline.insert_text
        self.readline.set_startup_hook(lambda: insert(text))
        try:
            yield
        finally:
            self.readline.set_startup_hook()

    def _add_line_to_history(self) -> None:
        """After Ctrl-C while typing, the up arrow brings the line back."""
        if self.readline is not None and (line := self.readline.get_line_buffer()).strip():
            self.readline.add_history(line)


def _as_llava(message: Message) -> str:
    """Return a message with a placeholder for each picture or video. A new line follows a single one."""
    from pumice.conversation import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Video

    end = "\n" * (len(message.images) == 1)  # as in LLaVA
    return "".join(
        part
        if isinstance(part, str)
        else (VIDEO_PLACEHOLDER if isinstance(part.source, Video) else IMAGE_PLACEHOLDER) + end
        for part in message.parts
    )


def _read_file(path: str, frames: int | None, as_video: bool = False) -> tuple[str, bytes | Video]:
    """Return a path, and the bytes of its picture, or its video.

    An animation is a video only if frames are asked for, or `as_video`. Raises InputError if a picture cannot
    be decoded, or a still one should be a video.
    """
    from pumice.conversation import Video
    from pumice.images import is_animated, is_video, open_image, read_image

    if is_video(path):
        return path, Video(path, frames)
    data = read_image(path)
    if (as_video or frames is not None) and is_animated(data):
        return path, Video(path, frames)
    if as_video:
        raise InputError(f"'{path}' is a single picture; show it with /image")
    open_image(data)
    return path, data


def _readline() -> ModuleType | None:
    try:
        readline = import_module("readline")
    except ImportError:  # Windows
        return None
    readline.parse_and_bind("tab: complete")  # without a completer of its own, readline completes paths
    readline.set_completer(None)
    readline.set_completer_delims(" \t\n")
    return readline


def _clean(text: str) -> str:
    """Return the path in a text that was typed, quoted, or dropped by a file manager."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    if text.startswith("file://"):
        text = unquote(urlparse(text).path)
    return str(Path(text).expanduser()) if text else ""


def _existing_files(text: str) -> list[str]:
    """Return the paths in a line, with spaces or in quotes; [] unless all of them are files."""
    candidates = [[_clean(text)]]
    with contextlib.suppress(ValueError):  # a single quotation mark cannot be a list of paths
        candidates.append([_clean(word) for word in shlex.split(text)])
    for paths in candidates:
        with contextlib.suppress(OSError, ValueError):  # a long question cannot be a file name
            if paths and all(path and Path(path).is_file() for path in paths):
                return paths
    return []
