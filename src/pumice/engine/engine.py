"""The engine: many prompts become tokens together, joining and leaving between steps.

Knows: a Llava, its KV cache, requests. Does not know: text, templates, pictures' pixels. A step is one
pass of the decoder over the new tokens of all running requests, end to end: one token of each answer,
and a chunk of the prompts. Answers of a greedy or seeded prompt do not depend on their neighbours, on
chunks, or on what was cached, to rounding; `pumice.engine.generate.naive_generate` is the reference.

Shapes: T new tokens of a step, R requests whose next token is due, D width, V vocabulary.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pumice.engine.cache import PrefixCache
from pumice.engine.native import NativeDecoder, native_decoder
from pumice.engine.requests import Delta, Finish, Prompt, Request, check_room
from pumice.engine.sampling import TokenLogprob, sample, token_logprobs
from pumice.engine.scheduler import Scheduler
from pumice.errors import InputError
from pumice.kernels.allocator import keep_freed_memory
from pumice.model.cache import KVCache, Segment
from pumice.model.llava import Llava

CACHE_BYTES = 1 << 30  # the KV cache's size where nobody says otherwise, more if one context needs more
FREED_BYTES = 256 * 2**20  # that stay with the process from step to step: a long prompt frees some 100 MB


@dataclass(frozen=True)
class EngineStats:
    """What the engine does now, and what it did since it was made."""

    running: int
    waiting: int
    slots: int
    cached_tokens: int  # kept of finished requests, to be shared
    cache_capacity: int  # tokens
    prompt_tokens: int  # of the requests that began
    generated_tokens: int
    prefix_hits: int  # of prompt_tokens, those that were not computed again
    evictions: int  # finished requests that had to make room
    steps: int


class Engine:
    """Answers up to `slots` prompts at a time; more wait in order.

    cache_tokens: how many tokens the KV cache holds, running and finished requests together; about a
    gigabyte when None, and always one context. chunk: tokens of prompts in one step. prefix_cache: keep
    finished requests, so that a prompt that begins like one of them computes only the rest.

    The model must not change while requests run; after it has, call `forget`.
    """

    def __init__(
        self,
        model: Llava,
        *,
        slots: int = 16,
        cache_tokens: int | None = None,
        chunk: int = 512,
        prefix_cache: bool = True,
    ) -> None:
        for name, value in (("slots", slots), ("chunk", chunk), ("cache_tokens", cache_tokens)):
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; give 1 or more")
        config = model.config.decoder
        if cache_tokens is None:
            each = KVCache.bytes_per_token(config, model.decoder.cache_dtype)
            cache_tokens = max(config.context, min(CACHE_BYTES // each, 2 * slots * config.context))
        if model.device.type == "cpu":
            keep_freed_memory(FREED_BYTES)
        self.model, self.slots = model, slots
        self._cache = KVCache(config, cache_tokens, model.device, model.decoder.cache_dtype)
        self._native = native_decoder(model.decoder, self._cache)
        self._prefix = PrefixCache(cache_tokens, keep=prefix_cache)
        self._scheduler = Scheduler(slots, chunk, self._prefix, self._cache.copy)
        self._stops = frozenset(model.config.stop_token_ids)
        self._arrived: list[Request] = []  # guarded by _changed, as is _closed; the rest by _stepping
        self._changed = threading.Condition()
        self._stepping = threading.RLock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._generated_tokens = self._steps = 0

    def submit(self, prompt: Prompt, deliver: Callable[[Delta], None]) -> Request:
        """Queue a prompt; `deliver` is called with each Delta by whichever thread steps, so it must be quick.

        Raises InputError when the prompt can never fit, ValueError when its pictures and placeholders differ.
        """
        check_room(self.model, prompt)
        prompt.check(self.model.config.decoder.vocab_size)
        length, context = len(prompt.input_ids), self.model.config.decoder.context
        limit = min(context, length + prompt.params.max_new_tokens) - 1
        places = self._cache.places
        if length > places:
            raise InputError(
                f"the prompt takes {length} tokens and the engine's cache holds {places}; "
                "shorten the question, show fewer pictures, or give the engine a larger cache"
            )
        if limit > places:
            raise InputError(
                f"a prompt of {length} tokens and an answer of up to {limit + 1 - length} do not fit in a "
                f"cache of {places} tokens; ask for at most {places + 1 - length}, or for a larger cache"
            )
        request = Request(prompt, deliver, prompt.params.generator(self.model.device), limit)
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._arrived.append(request)
            self._changed.notify_all()
        return request

    def cancel(self, request: Request) -> None:
        """End a request; its owner hears "cancelled" at the next step, unless it ended before."""
        request.cancelled = True
        with self._changed:
            self._changed.notify_all()

    def step(self) -> bool:
        """Compute the next tokens of the running requests; False only when no request is here."""
        with self._stepping, torch.inference_mode():
            with self._changed:
                arrived, self._arrived = self._arrived, []
            self._scheduler.waiting.extend(arrived)
            everyone = (*self._scheduler.running, *self._scheduler.waiting)
            for request in [r for r in everyone if r.cancelled]:
                self._finish(request, "cancelled")
            try:
                plan = self._scheduler.plan()
            except Exception as error:  # no memory to copy in, say: nobody may wait for ever
                for request in (*self._scheduler.running, *self._scheduler.waiting):
                    self._finish(request, "error", error)
                return True
            if not plan:
                return False
            self._run(plan)
            self._steps += 1
            return True

    def start(self) -> None:
        """Step in a thread of its own from now on, sleeping while there is nothing to do."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name="pumice-engine", daemon=True)
            self._thread.start()

    @property
    def started(self) -> bool:
        return self._thread is not None

    def close(self) -> None:
        """End the thread and every request in progress, as "cancelled". The engine takes no more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._stepping:
            with self._changed:
                arrived, self._arrived = self._arrived, []
            for request in (*self._scheduler.running, *self._scheduler.waiting, *arrived):
                self._finish(request, "cancelled")

    def forget(self) -> None:
        """Drop what finished requests left in the cache: the model has changed."""
        with self._stepping:
            self._prefix.clear()
            self._native = native_decoder(self.model.decoder, self._cache)

    def stats(self) -> EngineStats:
        """Numbers as they are between two steps, without waiting for the step that runs."""
        scheduler = self._scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._arrived),
            slots=self.slots,
            cached_tokens=self._prefix.held,
            cache_capacity=self._prefix.capacity,
            prompt_tokens=scheduler.prompt_tokens,
            generated_tokens=self._generated_tokens,
            prefix_hits=scheduler.hits,
            evictions=self._prefix.evictions,
            steps=self._steps,
        )

    def _loop(self) -> None:
        while True:
            worked = self.step()
            with self._changed:
                if self._closed:
                    return
                if not worked and not self._arrived:
                    self._changed.wait()

    def _run(self, plan: list[tuple[Request, int]]) -> None:
        try:
            plan = self._look(plan)
            groups = self._groups(plan)
            found = [logits for group in groups if (logits := self._forward(group)) is not None]
            if found:
                self._deliver([item for group in groups for item in group], torch.cat(found))
        except Exception as error:  # whatever it was (no memory, say), the requests of this step bear it
            for request, _ in plan:
                if request.finish is None:
                    self._finish(request, "error", error)

    def _groups(self, plan: list[tuple[Request, int]]) -> list[list[tuple[Request, int]]]:
        """Requests that are computed together: those that write apart where compiled code is theirs alone."""
        if not plan or self._native is None or self._compiled(plan):
            return [plan] if plan else []
        writing = [request.remaining == 1 for request, _ in plan]
        groups = [[item for item, one in zip(plan, writing, strict=True) if one == w] for w in (True, False)]
        return [group for group in groups if group]

    def _compiled(self, plan: list[tuple[Request, int]]) -> NativeDecoder | None:
        """Compiled code, where it serves these tokens: not the many of a long prompt."""
        many = sum(count for _, count in plan if count > 1)
        return self._native if self._native is not None and many <= self._native.rows else None

    def _look(self, plan: list[tuple[Request, int]]) -> list[tuple[Request, int]]:
        """Get the image tokens that this step needs; a picture that fails ends only its own requests."""
        sound = []
        for request, count in plan:
            try:
                request.shown = self._image_tokens(request, count)
            except Exception as error:
                self._finish(request, "error", error)
            else:
                sound.append((request, count))
        return sound

    def _image_tokens(self, request: Request, count: int) -> tuple[np.ndarray, Tensor] | None:
        """(which of the next `count` tokens are placeholders, the image tokens that replace them)."""
        start = request.computed
        first, last = np.searchsorted(request.placeholders, (start, start + count))
        if first == last:
            return None
        pieces, before = [], 0
        for picture in request.prompt.pictures:
            lower, upper = max(first - before, 0), min(last - before, picture.count)
            if lower < upper:
                pieces.append(request.look(picture)[lower:upper])
            before += picture.count
        return request.placeholders[first:last] - start, torch.cat(pieces)

    def _forward(self, plan: list[tuple[Request, int]]) -> Tensor | None:
        """Logits (R, V) after the requests whose next token is due, or None when none is."""
        model, segments, due, at = self.model, [], [], 0
        pieces = []
        for request, count in plan:
            region = request.region
            assert region is not None
            pieces.append(request.ids[region.length : region.length + count])
            segments.append(Segment(region.start, region.length, count))
            at += count
            if region.length + count == request.count:
                due.append(at - 1)
        ids = torch.from_numpy(np.concatenate(pieces)).to(model.device)
        x = model.decoder.embed(ids.clamp(min=0))
        at = 0
        for request, count in plan:
            if request.shown is not None:
                places, tokens = request.shown
                x[torch.from_numpy(places + at).to(x.device)] = tokens.to(x)
                request.shown = None
            at += count
        logits: Tensor | None = None
        if native := self._compiled(plan):
            logits = native.logits(x, segments, due)
        else:
            rows = torch.tensor(due, dtype=torch.long, device=x.device)
            positions, attend = self._cache.positions(segments), self._cache.attend(segments)
            hidden = model.decoder(x[None], positions, attend, rows=rows)[0]
            if due:
                logits = model.decoder.logits(hidden)
        for request, count in plan:
            region = request.region
            assert region is not None
            region.append(request.keys[region.length : region.length + count])
        return logits if due else None

    def _choose(self, requests: list[Request], logits: Tensor) -> list[int | Exception]:
        """The next token of each request, or what kept it from being chosen."""
        chosen: list[int | Exception] = logits.argmax(-1).tolist()
        for row, request in enumerate(requests):
            params, constraint = request.prompt.params, request.constraint
            if not (params.temperature or params.repetition_penalty != 1 or constraint is not None):
                continue
            try:
                allowed = constraint.allowed() if constraint is not None else None
                history, generators = [request.ids.tolist()], [request.generator]
                token = int(sample(logits[row : row + 1], params, history, generators, allowed))
                if constraint is not None and token not in self._stops:
                    constraint.accept(token)
                chosen[row] = token
            except Exception as error:  # a constraint too hard to follow ends its own request
                chosen[row] = error
        return chosen

    def _deliver(self, plan: list[tuple[Request, int]], logits: Tensor) -> None:
        due = [request for request, _ in plan if request.remaining == 0]
        for row, (request, token) in enumerate(zip(due, self._choose(due, logits), strict=True)):
            if isinstance(token, Exception):
                self._finish(request, "error", token)
                continue
            if token in self._stops:
                self._finish(request, "stop")
                continue
            self._generated_tokens += 1
            wanted = request.prompt.params.logprobs
            logprobs = None if wanted is None else (token_logprobs(logits[row], token, wanted),)
            request.add(token)
            if request.count > request.limit:
                self._finish(request, "length", tokens=(token,), logprobs=logprobs)
            else:
                self._tell(request, Delta((token,), logprobs, None, None, request.cached_tokens))

    def _finish(
        self,
        request: Request,
        finish: Finish,
        error: Exception | None = None,
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] | None = None,
    ) -> None:
        self._scheduler.remove(request)
        request.finish = finish
        self._tell(request, Delta(tokens, logprobs, finish, error, request.cached_tokens))

    def _tell(self, request: Request, delta: Delta) -> None:
        try:
            request.deliver(delta)
        except Exception:  # the owner's fault, from which no other request may suffer
            logging.getLogger("pumice").exception("the owner of a request failed to take a delta")
            request.cancelled = True
