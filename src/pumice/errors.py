"""The two kinds of error that end a command in one sentence. Standard library only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


class InputError(ValueError):
    """Something given to Pumice is wrong: a file, a row, a name, a number.

    The message is one sentence that names the thing and the remedy; the command line prints it
    without a traceback and leaves with status 2.
    """


class WorkError(RuntimeError):
    """The input was right, but the work could not be done: a loss that is no number, a full disk.

    The message is one sentence; the command line prints it without a traceback and leaves with status 1.
    """


@contextlib.contextmanager
def official(what: Callable[[], str]) -> Iterator[None]:
    """Reads a publisher's files: a field that is missing or of another kind becomes an InputError.

    what: the files, and how far they were read, in words.
    """
    try:
        yield
    except InputError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        told = f"{type(error).__name__}, {error}"
        raise InputError(f"{what()}: its fields are not the official ones ({told}); fetch it anew") from error
