"""The two kinds of error that end a command in one sentence. Standard library only."""

from __future__ import annotations


class InputError(ValueError):
    """Something given to Pumice is wrong: a file, a row, a name, a number.

    The message is one sentence that names the thing and the remedy; the command line prints it
    without a traceback and leaves with status 2.
    """


class WorkError(RuntimeError):
    """The input was right, but the work could not be done: a loss that is no number, a full disk.

    The message is one sentence; the command line prints it without a traceback and leaves with status 1.
    """
