"""What a request delivers, as text: pieces of the answer, and how it ended.

Knows: deltas, and a function from ids to text. Does not know: tokenizers, models, the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pumice.engine.detokenize import Detokenizer
from pumice.engine.requests import Delta, Finish


class TextStream:
    """Feed it every Delta of one request with `add`; the pieces joined are the answer.

    finish: None while the answer grows, then how it ended; "stop" as soon as a stop string is met, when
    the caller should cancel the request: what it still delivers is ignored. tokens: written so far.
    error: with "error", what went wrong. cached_tokens: of the prompt, those that were not computed.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self.finish: Finish | None = None
        self.error: Exception | None = None
        self.tokens = self.cached_tokens = 0
        self._text = Detokenizer(decode, stop)

    def add(self, delta: Delta) -> str:
        """The text that this delta makes certain; often ""."""
        if self.finish is not None:
            return ""
        self.cached_tokens = delta.cached_tokens
        piece = ""
        for token in delta.tokens:
            self.tokens += 1
            piece += self._text.add(token)
            if self._text.stopped:
                self.finish = "stop"
                return piece
        if delta.finish is not None:
            piece += self._text.finish()
            self.finish, self.error = delta.finish, delta.error
            if self._text.stopped:
                self.finish = "stop"
        return piece
