"""Run chat templates, which are untrusted code, in a process of its own with bounds on time and memory.

    python -m pumice.formats.text.isolated

reads one JSON object from standard input, the arguments of `describe`, and writes one: what it returns.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from pumice.config import ChatFormat
from pumice.config_json import from_dict
from pumice.errors import InputError
from pumice.formats.text import chat_template
from pumice.formats.text.chat_template import Described
from pumice.jsonl import parse_json
from pumice.stopping import limit_process, run_bounded
from pumice.templates import TEMPLATES

CPU_SECONDS = 10  # far more than any real template takes
WALL_SECONDS = 120  # on a busy machine; the only bound of time where the system cannot count CPU seconds
MEMORY = 2**30  # bytes of address space; Linux keeps to it


def describe(
    source: str, *, bos: str | None, eos: str | None, specials: Collection[str], label: str
) -> Described:
    """Do `chat_template.describe` within bounds. Raises InputError also when the template exceeds them."""
    result = _run(source, bos, eos, tuple(specials))
    if "error" in result:
        raise InputError(f"{label}: {result['error']}")
    chat = result["chat"]
    chat_format = None if chat is None else from_dict(ChatFormat, chat, label)
    return Described(result["template"], chat_format, result["writes_bos"])


def image_wrap(
    source: str, *, bos: str | None, eos: str | None, specials: Collection[str]
) -> tuple[str, str] | None:
    """Do `chat_template.image_wrap` within bounds; None if the template exceeds them."""
    wrap = _run(source, bos, eos, tuple(specials)).get("wrap")
    return None if wrap is None else (wrap[0], wrap[1])


@functools.lru_cache(maxsize=4)  # a model's import asks both questions
def _run(source: str, bos: str | None, eos: str | None, specials: tuple[str, ...]) -> dict[str, Any]:
    """Return the answer of a new process; {"error": message} if there is none."""
    request = {"source": source, "bos": bos, "eos": eos, "specials": specials}
    output, ended = run_bounded(__name__, request, WALL_SECONDS)
    if ended and isinstance(result := parse_json(output), dict):
        return result
    return {
        "error": f"this chat template takes more than {CPU_SECONDS} s or {MEMORY >> 20} MB to write a "
        f"conversation; name the format with --template, one of: {', '.join(TEMPLATES)}"
    }


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    wrap = chat_template.image_wrap(**request)
    try:
        return {**asdict(chat_template.describe(**request)), "wrap": wrap}
    except InputError as error:
        return {"error": str(error), "wrap": wrap}


if __name__ == "__main__":
    limit_process(CPU_SECONDS, MEMORY)
    json.dump(_answer(json.load(sys.stdin)), sys.stdout)
