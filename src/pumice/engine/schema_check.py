"""Compile a JSON Schema in a process of its own: some take minutes, or all memory, and no library stops.

    python -m pumice.engine.schema_check

reads a schema from standard input and writes why it cannot be followed, or nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from pumice.errors import InputError

LARGEST = 1 << 16  # bytes of a schema
DEEPEST = 32  # levels of nesting
CPU_SECONDS = 2  # real schemas take some milliseconds; Linux and macOS keep to it
WALL_SECONDS = 30  # on a busy machine; the only bound of time on Windows
MEMORY = 2 << 30  # bytes of address space; Linux keeps to it
# Of llguidance: states of one answer's lexer, of 1 to 2 kB each. Its other limits bound a step to some
# milliseconds.
LEXER_STATES = 25_000
# Its extension, by which a schema could change the grammar that is made of it.
EXTENSION = "x-guidance"


def refused(reason: str) -> InputError:
    """Return the error about a schema. llguidance adds its whole state to some reasons."""
    reason = " ".join(reason.partition("<state>")[0].split())[:200]
    return InputError(f"the JSON schema cannot be followed ({reason}); simplify it")


def schema_text(schema: Mapping[str, Any]) -> str:
    """Return a schema as JSON. Raises InputError where it is too large or too deep, or none."""
    level: list[Any] = [schema]
    for _ in range(DEEPEST):
        if any(isinstance(value, Mapping) and EXTENSION in value for value in level):
            raise refused(f"{EXTENSION} is not allowed")
        level = [
            child
            for value in level
            if isinstance(value, Mapping | list | tuple)
            for child in (value.values() if isinstance(value, Mapping) else value)
        ]
        if len(level) > LARGEST:
            break
    else:
        if level:
            raise refused(f"it has more than {DEEPEST} levels")
    try:
        text = json.dumps(schema)
    except (TypeError, ValueError) as error:
        raise refused(str(error)) from error
    if len(text) > LARGEST:
        raise refused(f"it has {len(text)} bytes, more than {LARGEST}")
    return text


class SchemaCheck:
    """The process that compiles a schema. `stop`, from any thread, ends it.

    text: as `schema_text` returns it.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._lock = threading.Lock()

    def run(self) -> None:
        """Wait until the schema is compiled. Raises InputError if that fails, is too much or was stopped."""
        command = [sys.executable, "-m", __name__]
        with self._lock:
            if self._stopped:
                raise refused("the check was stopped")
            self._process = process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        try:
            reason, _ = process.communicate(self._text.encode(), timeout=WALL_SECONDS)
        except subprocess.TimeoutExpired:
            reason = b""
        finally:
            process.kill()
            process.communicate()
        if process.returncode:
            raise refused(f"it takes more than {CPU_SECONDS} s or {MEMORY >> 20} MB to compile")
        if reason:
            raise refused(reason.decode())

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            if self._process is not None:
                self._process.kill()


def compile_schema(text: str, tokenizer: Any) -> Any:
    """Return llguidance's matcher of a schema at its beginning. Raises InputError if none can follow it.

    tokenizer: an LLTokenizer.
    """
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_lexer_states=LEXER_STATES)
    try:
        # No optional blanks: a small model could write them for ever.
        grammar = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False})
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    except ValueError as error:
        raise refused(str(error)) from error
    # Compute the first tokens with a copy. Some schemas are found to be impossible only then.
    first = matcher.deep_copy()
    mask = None if first.is_error() else first.compute_bitmask()
    if first.is_error():
        raise refused(first.get_error())
    ends = tokenizer.eos_tokens
    if mask is None or not any(
        bits >> bit & 1 and 8 * place + bit not in ends
        for place, bits in enumerate(mask)
        if bits
        for bit in range(8)
    ):
        raise refused("no value satisfies it")
    return matcher


def _limit() -> None:
    """Bound this process's CPU time and memory, where the system can, and let others go first."""
    if sys.platform == "win32":
        return
    import resource

    os.nice(10)
    for kind, limit in ((resource.RLIMIT_CPU, CPU_SECONDS), (resource.RLIMIT_AS, MEMORY)):
        hard = resource.getrlimit(kind)[1]
        with contextlib.suppress(ValueError):  # as for memory on macOS
            resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


if __name__ == "__main__":
    _limit()
    from llguidance import LLTokenizer

    try:
        compile_schema(sys.stdin.read(), LLTokenizer("byte"))
    except InputError as problem:
        sys.stdout.write(str(problem).partition(" (")[2].rpartition(");")[0])
