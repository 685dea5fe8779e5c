"""The two errors that end a command with one sentence instead of a traceback, and a remedy that many name."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from importlib import import_module
from typing import Any

CAUSE = "\0"  # stands for the error in a sentence of `wrong_input`: no path or value that is shown holds it
NEWER = "; remove it, or update Pumice if a newer version wrote it"  # the remedy for an unknown name


class _Sentence(Exception):
    """An error whose message quotes what files say, which may be long words: these are cut off."""

    def __str__(self) -> str:
        # Compiled when an error is shown: `import pumice` stays quick.
        return re.sub(r"\S{1000,}", lambda word: cut(word[0]), super().__str__())  # longer than a path


class InputError(_Sentence, ValueError):
    """The input is wrong: a file, a row, a name or a number.

    The message is one sentence that names the thing and the remedy; the command line prints it
    without a traceback and exits with status 2.
    """


class RowError(InputError):
    """What is wrong with a row of data. kind: in a few words, as `data check` counts it."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str]]:
        return type(self), (self.kind, str(self))


class ContextOverflow(InputError):
    """The prompt takes more tokens than the model's context, or the engine's cache, holds.

    tokens: of the prompt. limit: of the context or of the cache.
    """

    def __init__(self, message: str, tokens: int, limit: int) -> None:
        super().__init__(message)
        self.tokens, self.limit = tokens, limit


class WorkError(_Sentence, RuntimeError):
    """The input was right, but the work could not be done: a loss that is no number, a full disk.

    The message is one sentence; the command line prints it without a traceback and exits with status 1.
    """


def cut(text: str, characters: int = 200) -> str:
    """Return a text from outside as a message shows it: cut off where it is longer."""
    return text if len(text) <= characters else f"{text[:characters]}... ({len(text)} characters)"


def shorten(value: object, characters: int = 200) -> str:
    """Return a value from outside as a message shows it: its repr, cut off where it is longer."""
    try:
        return cut(repr(value), characters)
    except ValueError:  # a whole number of thousands of digits
        return "a number of too many digits"


def instead_of(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the known one that it may mean, or NEWER."""
    meant = near(name, known)
    return f"; did you mean {meant!r}?" if meant else NEWER


def near(name: str, known: Iterable[str], alike: float = 0.6) -> str | None:
    """Return the known name that an unknown one may mean, if any. alike: how much, 0 to 1."""
    import difflib  # here, as in `install`: `import pumice` stays quick

    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=alike)), None)


def check_known(value: object, known: Collection[str], problem: str) -> None:
    """Raise InputError unless the value is a known one: the problem, and which can be used.

    The value may be any of a JSON file, also a list, which has no hash.
    """
    if value not in tuple(known):
        raise InputError(f"{problem}; use {'one of ' if len(known) > 1 else ''}{', '.join(known)}")


def finite(value: float, label: str) -> float:
    """Return a number from a file as a float. Raise InputError, beginning with `label`, unless finite."""
    try:
        number = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"{label}: expected a finite number, found {shorten(value)}")
    return number


@contextlib.contextmanager
def wrong_input(kinds: type[Exception] | tuple[type[Exception], ...], sentence: str) -> Iterator[None]:
    """Turn errors of these kinds into an InputError with this sentence; CAUSE in it stands for the error."""
    try:
        yield
    except kinds as error:
        cause = getattr(error, "strerror", None) or error  # an OSError's own text repeats the path
        raise InputError(sentence.replace(CAUSE, str(cause))) from error


@contextlib.contextmanager
def official(describe: Callable[[], str], own_row: str = "") -> Iterator[None]:
    """Turn errors while reading a publisher's files into InputErrors: a missing field, a wrong type.

    describe: returns a description of the files and of the position in them, for the message. own_row: a
    right row, where the user wrote the file.
    """
    try:
        yield
    except InputError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        if own_row:
            raise InputError(f"{describe()}: {error}; a right row is {own_row}") from error
        detail = f"{type(error).__name__}, {error}"
        raise InputError(
            f"{describe()}: its fields are not the official ones ({detail}); fetch it anew"
        ) from error


def some(names: Sequence[str], limit: int = 5) -> str:
    """Return the first few names, and how many more there are, for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def counted(number: int, noun: str, verb: str = "", *, of: int | None = None) -> str:
    """Return "1 picture" or "2 pictures"; with the verb "are", "1 picture is" or "2 pictures are".

    verb: more may follow its first word, which alone changes. of: for "1 of 3 pictures is".
    """
    if number == 1:
        first, *more = verb.split(" ")
        first = {"are": "is", "have": "has", "do": "does"}.get(first, first and f"{first}s")
        verb = " ".join([first, *more])
    noun = plural(noun, number if of is None else of)
    return f"{number}{'' if of is None else f' of {of}'} {noun} {verb}".rstrip()


def plural(noun: str, number: int) -> str:
    """Return a noun as it stands behind a number."""
    if number == 1:
        return noun
    if noun.endswith("ix"):
        return f"{noun[:-2]}ices"
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def install(extra: str) -> str:
    """Return the command that adds an extra to this installation, from a clone, a file or an index."""
    import json
    from importlib.metadata import PackageNotFoundError, distribution
    from urllib.parse import unquote, urlparse

    try:
        origin = json.loads(distribution("pumice").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        origin = {}
    if "dir_info" in origin:  # a folder: the clone, which may be anywhere
        option = "-e " if origin["dir_info"].get("editable") else ""
        return f"pip install {option}'{unquote(urlparse(origin['url']).path)}[{extra}]'"
    return f"pip install 'pumice[{extra}]{' @ ' + origin['url'] if 'url' in origin else ''}'"


def library(module: str, need: str, extra: str) -> Any:
    """Import a library of an extra. Raises InputError where it is missing. need: the sentence's beginning."""
    try:
        return import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # not there, or what it loads itself does not load
        raise InputError(f"{need}: {install(extra)}") from error
