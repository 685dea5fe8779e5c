"""Show on a terminal how much of a long prompt is read, until the answer begins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pumice.progress import StatusLine

if TYPE_CHECKING:
    from pumice.assistant import Reply

LONG_PROMPT = 256  # tokens; a shorter one is read before anybody waits


def pieces(reply: Reply) -> Iterator[str]:
    """Yield the pieces of a reply. Until the first, a line on stderr shows how much of the prompt is read."""
    line = StatusLine()

    def show(computed: int, total: int) -> None:
        if total >= LONG_PROMPT:
            line.show(f"reading: {computed:,} of {total:,} tokens")

    reply.on_prompt = show
    try:
        for piece in reply:
            line.clear()
            yield piece
    finally:
        line.clear()
