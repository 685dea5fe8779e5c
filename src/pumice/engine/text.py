"""What a request delivers, as text: pieces of the answer, and how it ended.

Text comes as the tokens do: never half a character, nothing of or after a stop string. Knows: deltas, and a
function from ids to text. Does not know: tokenizers, models, the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pumice.engine.requests import Delta, Finish

_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not, or not yet, a character


class Detokenizer:
    """Feed it ids with `add`, end with `finish`; the returned pieces joined are the answer.

    A character of several byte tokens comes out whole, with its last token. Text that may be the
    beginning of a stop string is held back until it is clear. `stopped` says that a stop string was
    met: the first one to be complete, however the text is cut into tokens.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self.decode = decode
        self.stop = tuple(stop)
        self.stopped = False
        self._ids: list[int] = []
        # ids[before:done] were the last to come out. They are decoded again with those that follow,
        # because a decoder may treat the beginning of a text in its own way (SentencePiece's space).
        self._before = self._done = 0
        self._held = ""

    def add(self, token: int) -> str:
        """The text that has become certain; often "" and never anything after a stop string."""
        self._ids.append(token)
        whole = self.decode(self._ids[self._before :])
        return "" if whole.endswith(_REPLACEMENT) else self._take(whole)

    def finish(self) -> str:
        """What was held back, when no more tokens will come."""
        text = self._take(self.decode(self._ids[self._before :])) + self._held
        self._held = ""
        return text

    def _take(self, whole: str) -> str:
        if self.stopped:
            return ""
        self._held += whole[len(self.decode(self._ids[self._before : self._done])) :]
        self._before, self._done = self._done, len(self._ids)
        found = [(at + len(text), at) for text in self.stop if (at := self._held.find(text)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)[1]], ""
            return text
        keep = max((_overlap(self._held, text) for text in self.stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


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
