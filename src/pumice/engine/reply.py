"""An answer that is being written, as an iterator over its pieces of text."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence

from pumice.engine.engine import Engine
from pumice.engine.requests import Delta, Prompt, Request
from pumice.engine.text import TextStream
from pumice.errors import InputError


class Reply(Iterator[str]):
    """An answer that is being written: iterate over it to get its pieces of text.

    finish: None until the answer is complete; then "stop" or "length", or "cancelled" if it was closed.
    tokens: number of answer tokens so far. cached_tokens: prompt tokens that were computed for earlier
    questions. on_prompt: called with (tokens of the prompt that are computed, all of them) while it is read,
    unless the engine has a thread of its own.
    """

    def __init__(
        self,
        engine: Engine,
        decode: Callable[[Sequence[int]], str],
        prompt: Prompt,
        on_end: Callable[[], object] | None = None,
    ) -> None:
        self._engine, self._prompt, self._on_end = engine, prompt, on_end
        self._text = TextStream(decode, prompt.params.stop, prompt.prefix)
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # None comes last
        self._requests: list[Request] = []  # empty before `begin`, then one
        self.on_prompt: Callable[[int, int], object] | None = None

    @property
    def finish(self) -> str | None:
        return self._text.finish

    @property
    def tokens(self) -> int:
        return self._text.tokens

    @property
    def cached_tokens(self) -> int:
        return self._text.cached_tokens

    @property
    def prompt_progress(self) -> tuple[int, int]:
        """How many tokens of the prompt are computed, and how many it has."""
        total = len(self._prompt.input_ids)
        # Once a beam search has begun, its hypotheses run in place of the request.
        computed = (request.computed if request.origin is None else total for request in self._requests)
        return min(total, sum(computed)), total

    def begin(self) -> Reply:
        """Submit the prompt to the engine. Asking for the first piece does this too."""
        if not self._requests:
            # `deliver` holds no reference to the reply, so that a reply nobody uses is closed by `__del__`.
            engine, text, pieces, requests, on_end = (
                self._engine, self._text, self._pieces, self._requests, self._on_end,
            )  # fmt: skip

            def deliver(delta: Delta) -> None:
                if text.finish is not None:
                    return
                if piece := text.add(delta):
                    pieces.put(piece)
                if text.finish is not None:
                    for request in requests:
                        engine.cancel(request)
                    pieces.put(None)
                    if on_end is not None:
                        on_end()

            requests.append(engine.submit(self._prompt, deliver))
            if text.finish is not None:  # it ended before `requests` had it
                engine.cancel(requests[0])
        return self

    def close(self) -> None:
        """Stop writing the answer."""
        for request in self._requests:
            self._engine.cancel(request)

    def __next__(self) -> str:
        self.begin()
        while not self._engine.started and self._pieces.empty():
            if self.on_prompt is not None and not self.tokens:
                self.on_prompt(*self.prompt_progress)
            self._engine.step()
        piece = self._pieces.get()
        if piece is not None:
            return piece
        self._pieces.put(None)
        if self._text.error is not None:
            raise self._text.error
        raise StopIteration

    def __del__(self) -> None:
        self.close()


def is_done(reply: Reply | InputError) -> bool:
    return isinstance(reply, InputError) or reply.finish is not None


def outcome(reply: Reply | InputError) -> str | InputError:
    if isinstance(reply, InputError):
        return reply
    try:
        return "".join(reply)
    except InputError as error:
        return error
