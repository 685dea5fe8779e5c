"""Show on a terminal how much of a long prompt is read, until the answer begins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pumice.progress import ProgressBar

if TYPE_CHECKING:
    from pumice.engine.reply import Reply

LONG_PROMPT = 256  # tokens; a shorter one is read before anybody waits


def pieces(reply: Reply) -> Iterator[str]:
    """Yield the pieces of a reply. Until the first, a bar on stderr shows how much of the prompt is read."""
    with ProgressBar(transient=True) as bar:

        def show(computed: int, total: int) -> None:
            if total >= LONG_PROMPT:
                bar.show(computed, total, "token read")

        reply.on_prompt = show
        for piece in reply:
            bar.close()
            yield piece
