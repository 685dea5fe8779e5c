"""Compile grammars in a process of their own: some take minutes, or all memory, and no library stops.

    python -m pumice.engine.grammar_check

reads a JSON list of grammars from standard input, and writes a line of JSON for each: why it cannot be
followed, or "".
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from pumice.errors import InputError
from pumice.stopping import limit_process, run_bounded

LARGEST = 1 << 17  # bytes of a grammar
ALL = 4 * LARGEST  # of those that are checked together
CPU_SECONDS = 2  # real ones take some milliseconds; Linux and macOS keep to it
WALL_SECONDS = 30  # on a busy machine; the only bound of time on Windows
MEMORY = 2 << 30  # bytes of address space; Linux keeps to it
# Of llguidance: states of one answer's lexer, of 1 to 2 kB each. Its other limits bound a step to some
# milliseconds.
LEXER_STATES = 25_000

_IMPOSSIBLE = "no answer satisfies it"
_PLACE = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")


def refused(reason: str, what: str) -> InputError:
    """Return the error about a grammar. Further lines of the library's reason repeat the grammar."""
    first = (reason.strip().splitlines() or ["without a reason"])[0].partition("<state>")[0]
    return InputError(f"the {what} cannot be followed ({_PLACE.sub('', first).strip()[:200]}); simplify it")


def check_grammars(grammars: Sequence[str]) -> list[str]:
    """Compile grammars once, to see that it works. Return for each why it cannot be followed, or "".

    Raises Stopped when the work is stopped.
    """
    size = max(map(len, grammars), default=0)
    if size > LARGEST:
        return [f"{size} characters, more than {LARGEST}"] * len(grammars)
    if (size := sum(map(len, grammars))) > ALL:
        return [f"{size} characters together, more than {ALL}"] * len(grammars)
    answer, _ = run_bounded(__name__, list(grammars), WALL_SECONDS)
    lines = [line for line in answer.splitlines(keepends=True) if line.endswith(b"\n")]
    reasons: list[str] = list(map(json.loads, lines))
    # Where it was stopped: the one that was being compiled, and those that were not tried.
    reason = f"it takes more than {CPU_SECONDS} s or {MEMORY >> 20} MB to compile"
    return reasons + [reason] * (len(grammars) - len(reasons))


def compile_grammar(grammar: str, tokenizer: Any) -> tuple[Any, str]:
    """Return llguidance's matcher of a grammar at its beginning, and why no answer can follow it, or "".

    grammar: in its dialect of Lark. tokenizer: an LLTokenizer.
    """
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_lexer_states=LEXER_STATES)
    try:
        matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0, limits=limits)
    except ValueError as error:
        return None, str(error)
    # Compute the first tokens with a copy. Some grammars are found to be impossible only then.
    first = matcher.deep_copy()
    mask = b"" if first.is_error() else first.compute_bitmask()
    if first.is_error():
        reason = first.get_error() or "it is too complex"
        return None, _IMPOSSIBLE if reason.startswith("NoExtensionBias") else reason
    for end in tokenizer.eos_tokens:
        mask = mask[: end // 8] + bytes([mask[end // 8] & ~(1 << end % 8)]) + mask[end // 8 + 1 :]
    return matcher, "" if any(mask) else _IMPOSSIBLE


if __name__ == "__main__":
    limit_process(CPU_SECONDS, MEMORY)
    if sys.platform != "win32":
        os.nice(10)  # answers go first
    from llguidance import LLTokenizer

    by_bytes = LLTokenizer("byte")
    for grammar in json.load(sys.stdin):
        print(json.dumps(compile_grammar(grammar, by_bytes)[1]), flush=True)
