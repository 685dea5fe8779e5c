"""Text from tokens, piece by piece: never half a character, and nothing of or after a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pumice.engine.requests import Delta, Finish

_REPLACEMENT = "\ufffd"  # stands for bytes that are not a complete character
_MOST_MISSING = 3  # bytes, and so tokens, that may complete a character of UTF-8
_MOST_HELD = 32  # tokens before these: SentencePiece writes U+FFFD for all bytes beside a wrong one


class Detokenizer:
    """Turns tokens into text. Call `add` for each token, then `finish`; the answer is all pieces joined.

    A character of several byte tokens is returned with its last token. Text that may be the beginning of a
    stop string is held back until that is clear. stopped: a stop string was found. The one that is complete
    first counts, however the text is cut into tokens. found: that stop string. prefix: what the chat format
    writes before an answer; where the text begins with it, it is left out.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = (), prefix: str = ""
    ) -> None:
        self.decode = decode
        self.stop = tuple(stop)
        self._prefix = prefix
        self.stopped = False
        self.found: str | None = None
        self._ids: list[int] = []
        # ids[context_start:decoded] gave the last piece. They are decoded again with the ids that follow,
        # because some decoders treat the beginning of a text differently (SentencePiece drops its space).
        self._context_start = self._decoded = 0
        self._held = ""

    def add(self, token: int) -> str:
        """Add a token. Return the text that is now certain: often "", and nothing after a stop string."""
        self._ids.append(token)
        text = self.decode(self._ids[self._context_start :])
        if not text.endswith(_REPLACEMENT):
            return self._release(text, len(self._ids))
        # Only the last tokens may belong to a character that is not complete. What stands before them is no
        # text, or U+FFFD itself: held back, it would be decoded again with every token.
        end = len(self._ids) - _MOST_MISSING
        if (held := end - self._decoded) > 0:
            before = self.decode(self._ids[self._context_start : end])
            longer = [
                self._length(self._context_start, n) - len(before) - self._length(end, n)
                for n in range(end + 1, len(self._ids) + 1)
            ]
            # Two parts of a character are longer than the character.
            if min(longer) >= 0 and (longer[-1] == 0 or held > _MOST_HELD):
                return self._release(before, end)
        return ""

    def _length(self, start: int, end: int) -> int:
        return len(self.decode(self._ids[start:end]))

    def finish(self) -> str:
        """Return the text that was held back, after the last token."""
        text = self._release(self.decode(self._ids[self._context_start :]), len(self._ids)) + self._held
        self._held = ""
        return text

    def _release(self, decoded: str, end: int) -> str:
        """Return the part of the text up to the token `end` that is new and certain; hold back the rest."""
        if self.stopped:
            return ""
        # 1. The new text is what follows the piece that was returned last.
        self._held += decoded[self._length(self._context_start, self._decoded) :]
        self._context_start, self._decoded = self._decoded, end
        # 2. Leave out the format's text before the answer, once it is clear whether it is there.
        if len(self._held) < len(self._prefix) and self._prefix.startswith(self._held):
            return ""
        self._held, self._prefix = self._held.removeprefix(self._prefix), ""
        # 3. End before the stop string that is complete first.
        matches = [
            (start + len(text), start, text) for text in self.stop if (start := self._held.find(text)) >= 0
        ]
        if matches:
            self.stopped = True
            _, start, self.found = min(matches)
            text, self._held = self._held[:start], ""
            return text
        # 4. Hold back an end that may become a stop string.
        overlap = max((_overlap(self._held, text) for text in self.stop), default=0)
        cut = len(self._held) - overlap
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class TextStream:
    """Turns the deltas of one request into text. Call `add` for each Delta; the answer is all pieces joined.

    finish: None while the answer grows, then how it ended. It is "stop" as soon as a stop string is found:
    the caller should then cancel the request, and later deltas are ignored. error: the exception behind
    "error". tokens: number of answer tokens so far. cached_tokens: prompt tokens that came from the prefix
    cache. stop: the stop string that was found. prefix: as of `Detokenizer`.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = (), prefix: str = ""
    ) -> None:
        self.finish: Finish | None = None
        self.error: Exception | None = None
        self.tokens = self.cached_tokens = 0
        self._text = Detokenizer(decode, stop, prefix)

    @property
    def stop(self) -> str | None:
        return self._text.found

    def add(self, delta: Delta) -> str:
        """Add a delta. Return the text that is now certain; often ""."""
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
