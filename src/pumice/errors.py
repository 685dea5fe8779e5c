"""The two errors that end a command with one sentence instead of a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


class InputError(ValueError):
    """The input is wrong: a file, a row, a name or a number.

    The message is one sentence that names the thing and the remedy; the command line prints it
    without a traceback and exits with status 2.
    """


class WorkError(RuntimeError):
    """The input was right, but the work could not be done: a loss that is no number, a full disk.

    The message is one sentence; the command line prints it without a traceback and exits with status 1.
    """


@contextlib.contextmanager
def official(describe: Callable[[], str]) -> Iterator[None]:
    """Turn errors while reading a publisher's files into InputErrors: a missing field, a wrong type.

    describe: returns a description of the files and of the position in them, for the message.
    """
    try:
        yield
    except InputError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        detail = f"{type(error).__name__}, {error}"
        raise InputError(
            f"{describe()}: its fields are not the official ones ({detail}); fetch it anew"
        ) from error
