"""The one kind of error that a person can mend: wrong input. Standard library only."""

from __future__ import annotations


class InputError(ValueError):
    """Something given to Pumice is wrong: a file, a row, a name, a number.

    The message is one sentence that names the thing and the remedy; the command line prints it
    without a traceback and leaves with status 2.
    """
