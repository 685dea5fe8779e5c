"""Run a script of this folder, which ends in one line where its input is wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable

from pumice.errors import InputError


def run(main: Callable[[], None]) -> None:
    """Call a script's `main`. Wrong input ends the process with status 2, without a traceback."""
    try:
        main()
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
