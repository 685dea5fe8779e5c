"""The engine answers many prompts at once; requests join and leave between its steps.

One step is one pass of the decoder over the new tokens of all running requests, laid end to end: one token of
each answer, and chunks of the prompts. A greedy or seeded answer does not depend, up to rounding, on other
requests, on chunks, or on the caches. `pumice.engine.generate.naive_generate` is the reference.

Shapes: T new tokens of a step, R requests whose next token is due, D width, V vocabulary.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pumice.engine.beams import BeamSearches
from pumice.engine.cache import PrefixCache
from pumice.engine.graphs import DecodeGraphs
from pumice.engine.native import TRIAL_ROWS, NativeDecoder, native_decoder
from pumice.engine.requests import Delta, Finish, Prompt, Request, cells_needed, check_room
from pumice.engine.sampling import TokenLogprob, random_generator, sample, token_logprobs
from pumice.engine.scheduler import Scheduler
from pumice.engine.sizes import cache_size, check_sizes, chunk_size, has_memory, mapped_bytes
from pumice.engine.snapshot import Snapshot
from pumice.engine.stats import EngineStats
from pumice.errors import WorkError
from pumice.kernels.allocator import keep_freed_memory
from pumice.model.cache import BLOCK, KVCache, Segment
from pumice.model.finite import finite_rows, why_not_finite
from pumice.model.llava import Llava
from pumice.model.transfer import numbers_on, to_device
from pumice.stopping import signals_wait

_LOG = logging.getLogger(__name__)
NOT_FINITE = -1  # in place of a token, where its logits are no numbers
# Freed memory that the process keeps: a long prompt frees some 100 MB in every step.
KEPT_FREED_BYTES = 256 * 2**20

Plan = list[tuple[Request, int]]  # requests, and how many tokens of each a step computes


class Engine:
    """Answers up to `slots` prompts at a time, each in its own slot of the KV cache; more wait in order.

    cache_tokens: tokens that the KV cache holds, of running and finished requests together. It is rounded up
    to whole blocks. memory_share: without `cache_tokens`, the share of the memory left beside the weights
    that the cache may take, as a server wants it; None gives about a gigabyte, or one context if that is
    more, within half of that memory; on CUDA, all slots at their longest, within half. chunk: prompt tokens
    per step; None chooses by device. prefix_cache: keep finished requests, so that a prompt that begins like
    one of them computes only its remaining tokens. one_call: on CUDA, attend with one kernel for all
    requests. graphs: with one_call, capture steps of answers as CUDA graphs. Both are off until
    benchmarks/gpu.py passed on a card; the first call is compared with the plain loop.

    The model must not change while requests run. After weights were edited in place, call `forget`. Replaced
    modules and hooks are noticed when the next request is taken.
    """

    def __init__(
        self,
        model: Llava,
        *,
        slots: int = 16,
        cache_tokens: int | None = None,
        chunk: int | None = None,
        prefix_cache: bool = True,
        memory_share: float | None = None,
        one_call: bool = False,
        graphs: bool = False,
    ) -> None:
        chunk = chunk_size(model.device) if chunk is None else chunk
        check_sizes(slots, cache_tokens, chunk)
        # 1. Size the cache by the memory that is free beside the weights.
        self.cache_tokens = cache_size(model, slots, cache_tokens, memory_share)
        # 2. Every step allocates and frees the same large tensors. Do not return them to the system.
        if model.device.type == "cpu":
            keep_freed_memory(KEPT_FREED_BYTES)
        # 3. Set up the parts that only the thread that steps uses.
        self.model, self.slots = model, slots
        self._not_finite: str | None = None  # why the model computes what is no number, once it did
        dtype = model.decoder.cache_dtype
        self._cache = KVCache(model.config.decoder, self.cache_tokens, model.device, dtype, BLOCK, one_call)
        # The decoder in C, where it can run; None where PyTorch computes every step.
        self._native = native_decoder(model.decoder, self._cache)
        self._graphs = DecodeGraphs(model.decoder, self._cache) if graphs else None
        self._snapshot = Snapshot(model)
        self._prefix_cache = PrefixCache(
            self._cache.blocks,
            self._cache.block,
            self._cache.copy,
            keep_finished=prefix_cache,
            has_memory=functools.partial(has_memory, model.device, mapped_bytes(model)),
        )
        self._scheduler = Scheduler(slots, chunk, self._prefix_cache)
        self._stops = frozenset(model.config.stop_token_ids)
        self._searches = BeamSearches(self._scheduler, self._stops)
        self._generated_tokens = self._steps = 0
        self._step_lock = threading.RLock()
        self._interrupted = False  # whether a step has begun and not ended
        # 4. `_changed` guards `_submitted` and `_closed`, which other threads write; `_step_lock` all else.
        self._submitted: list[Request] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, prompt: Prompt, deliver: Callable[[Delta], None]) -> Request:
        """Queue a prompt. `deliver` gets each Delta, in the thread that steps the engine: it must be quick.

        Raise InputError if the prompt can never fit, and ValueError if its images do not match its
        placeholders.
        """
        # 1. Refuse now what could never be answered: later, the request would wait for ever.
        check_room(self.model, prompt)
        prompt.check(self.model.config.decoder.vocab_size)
        max_cells = cells_needed(prompt, self.model.config.decoder.context, self.cache_tokens)
        # 2. Queue it, and wake the thread that steps.
        request = Request(prompt, deliver, random_generator(prompt.params), max_cells)
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._submitted.append(request)
            self._changed.notify_all()
        return request

    def cancel(self, request: Request) -> None:
        """End a request. It finishes as "cancelled" at the next step, unless it has ended before."""
        request.cancelled = True
        with self._changed:
            self._changed.notify_all()

    def step(self) -> bool:
        """Compute the next tokens of the running requests. Return False only if there is no request."""
        with self._step_lock, torch.inference_mode():
            self._recover()
            self._interrupted = True
            worked = self._step()
            self._interrupted = False
            return worked

    def _recover(self) -> None:
        if self._interrupted:  # such as by Ctrl-C
            self._searches.recover()
            self._scheduler.recover()
            self._interrupted = False

    def _take_submitted(self) -> list[Request]:
        """Let the scheduler have the new requests, and return them."""
        with self._changed:
            waiting, submitted = self._scheduler.waiting, self._submitted
            # After an interruption here, they are in the queue already.
            waiting.extend(request for request in submitted if request not in waiting)
            self._submitted = []
        return submitted

    def _step(self) -> bool:
        # 1. Take new requests from the queue.
        if self._take_submitted() and not self._snapshot.is_current():
            self.forget()
        # 2. End cancelled requests before they cost anything.
        for request in [request for request in self._requests() if request.submitted.cancelled]:
            self._finish(request, "cancelled")
        # 3. Plan: one token per running answer, then prompt chunks until the budget is used.
        try:
            plan = self._scheduler.plan()
        except WorkError as error:
            # No memory for the first of the queue. The next may be shorter.
            self._finish(self._scheduler.waiting[0], "error", error)
            return True
        except Exception as error:
            # Such as no memory for a copy. End all requests, so that none waits for ever.
            for request in self._requests():
                self._finish(request, "error", error)
            self._scheduler.recover()
            return True
        if not plan:
            return False
        # 4. Compute the planned tokens and deliver the new ones.
        self._run(plan)
        self._steps += 1
        return True

    def start(self) -> None:
        """Step in a background thread from now on. The thread sleeps while there is no request."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name="pumice-engine", daemon=True)
            self._thread.start()

    @property
    def started(self) -> bool:
        return self._thread is not None

    def close(self) -> None:
        """Stop the thread and end all requests as "cancelled". The engine takes no more requests."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        # A `deliver` that closes the engine runs in the engine's own thread, which cannot wait for itself.
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._step_lock:
            self._recover()
            self._take_submitted()
            for request in self._requests():
                self._finish(request, "cancelled")

    def forget(self) -> None:
        """Clear the prefix cache. Call it after the model's weights have changed; see `Assistant.forget`."""
        with self._step_lock:
            self._prefix_cache.clear()
            self._native = native_decoder(self.model.decoder, self._cache)
            self._graphs = self._graphs and DecodeGraphs(self.model.decoder, self._cache)
            self._snapshot = Snapshot(self.model)
            self._not_finite = None

    def stats(self) -> EngineStats:
        """Return the current numbers, without waiting for the step that is running."""
        scheduler = self._scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._submitted),
            slots=self.slots,
            cached_tokens=self._prefix_cache.cached_tokens,
            cache_capacity=self.cache_tokens,
            prompt_tokens=scheduler.prompt_tokens,
            generated_tokens=self._generated_tokens,
            prefix_hits=scheduler.prefix_hits,
            evictions=self._prefix_cache.evictions,
            steps=self._steps,
        )

    def _requests(self) -> tuple[Request, ...]:
        return (*self._scheduler.running, *self._scheduler.waiting)

    def _loop(self) -> None:
        while True:
            worked = self.step()
            with self._changed:
                if self._closed:
                    return
                if not worked and not self._submitted:
                    self._changed.wait()

    def _run(self, plan: Plan) -> None:
        """Compute the planned tokens and deliver what follows from them."""
        try:
            plan = self._encode_images(plan)
            groups = self._split(plan)
            logits = [rows for group in groups if (rows := self._forward(group)) is not None]
            if logits:
                self._deliver_next_tokens([item for group in groups for item in group], torch.cat(logits))
        except Exception as error:  # such as no memory: end the requests of this step, and only these
            for request, _ in plan:
                self._finish(request, "error", error)

    def _split(self, plan: Plan) -> list[Plan]:
        """Split a plan into groups that are computed together.

        Answers are always decoded by native code, if there is any. If it cannot take the step's prompt
        tokens, PyTorch computes the prompts separately. So an answer does not depend on the other requests.
        """
        if not plan or self._native is None or self._native_for(plan):
            return [plan] if plan else []
        answers = [(request, count) for request, count in plan if request.remaining == 1]
        prompts = [(request, count) for request, count in plan if request.remaining != 1]
        return [group for group in (answers, prompts) if group]

    def _native_for(self, plan: Plan) -> NativeDecoder | None:
        """Return the native decoder if it can take this plan. Long prompts are faster in PyTorch."""
        prompt_tokens = sum(count for _, count in plan if count > 1)
        if self._native is None or prompt_tokens > self._native.max_prompt_rows:
            return None
        return self._native

    def _encode_images(self, plan: Plan) -> Plan:
        """Get the image tokens of this step. Return the plan without the requests whose image failed."""
        encoded = []
        for request, count in plan:
            try:
                request.step_images = request.next_image_tokens(count)
            except Exception as error:
                self._finish(request, "error", error)
            else:
                encoded.append((request, count))
        # A hypothesis whose image failed has ended the others of its search.
        return [(request, count) for request, count in encoded if request.slot is not None]

    def _forward(self, plan: Plan) -> Tensor | None:
        """Return logits (R, V) for the requests whose next token is due, or None if there are none."""
        # 1. Lay the new tokens of all requests end to end, and note the rows whose logits are wanted: those
        #    after which a token is due, and those that predict a token of a prompt that is scored.
        segments, new_ids, rows_before = [], [], 0
        wanted: list[int] = []
        due: list[int] = []  # among the wanted rows
        scored: list[tuple[Request, slice]] = []  # among them, too
        for request, count in plan:
            slot = request.slot
            assert slot is not None
            new_ids.append(request.ids[slot.length : slot.length + count])
            segments.append(Segment(slot.table, slot.length, count))
            if request.scores_prompt:
                first = len(wanted)
                predicting = min(count, len(request.prompt.input_ids) - 1 - slot.length)
                wanted += range(rows_before, rows_before + predicting)
                scored.append((request, slice(first, len(wanted))))
            rows_before += count
            if slot.length + count == request.length:
                due.append(len(wanted))
                wanted.append(rows_before - 1)
        # 2. Run a step of answers alone as a CUDA graph, if there is one for so many.
        ids, logits = np.concatenate(new_ids), None
        if self._graphs is not None and self._answers_alone(plan, wanted):
            logits = self._graphs.logits(ids, segments)
        if logits is None:
            logits = self._compute(plan, ids, segments, wanted)
        for request, own in scored:
            request.score(logits[own])
        # 3. Only now record the tokens in their slots: if the pass is interrupted, the next step computes it
        #    again.
        for request, count in plan:
            slot = request.slot
            assert slot is not None
            self._prefix_cache.record(slot, request.token_hashes[: slot.length + count])
        if not due:
            return None
        return logits if len(due) == len(logits) else logits.index_select(0, numbers_on(logits.device, due))

    def _answers_alone(self, plan: Plan, wanted: list[int]) -> bool:
        """Return whether each request of a step brings one token and gets the next."""
        simple = all(request.step_images is None and not request.scores_prompt for request, _ in plan)
        return simple and len(wanted) == len(plan) == sum(count for _, count in plan)

    def _compute(self, plan: Plan, ids: np.ndarray, segments: list[Segment], wanted: list[int]) -> Tensor:
        """Return the logits of the wanted rows, of new tokens `ids` (T,) that lie end to end."""
        model = self.model
        # 1. Embed them. Placeholders have a negative id: embed any token, then overwrite it.
        x = model.decoder.embed(to_device(torch.from_numpy(ids), model.device).clamp(min=0))  # (T, D)
        rows_before = 0
        for request, count in plan:
            if request.step_images is not None:
                offsets, image_tokens = request.step_images
                x[to_device(torch.from_numpy(offsets + rows_before), x.device)] = image_tokens.to(x)
                request.step_images = None
            rows_before += count
        # 2. Choose compiled code or PyTorch. The first time, compare both.
        native = self._native_for(plan)
        if native and not native.compared and not native.agrees(x[:TRIAL_ROWS]):
            _LOG.warning(
                "compiled code does not give the logits of the decoder's modules, so PyTorch computes all "
                "answers, more slowly"
            )
            self._native = native = None
        # 3. Run the decoder. Only the wanted rows need logits: the vocabulary is the largest matrix.
        if native:
            return native.logits(x, segments, wanted)
        positions, attend = self._cache.positions(segments), self._cache.attend(segments)
        hidden = model.decoder(x[None], positions, attend, rows=numbers_on(x.device, wanted))[0]
        return model.decoder.logits(hidden)

    def _choose(self, requests: list[Request], logits: Tensor) -> list[int | Exception]:
        """Return the next token of each request, from logits (R, V), or the exception that prevented it."""
        # 1. Ask the constraints which tokens they allow. One that fails ends only its own request.
        failed: dict[int, Exception] = {}
        allowed: list[Tensor | None] = [None] * len(requests)
        for row, request in enumerate(requests):
            if request.constraint is not None:
                try:
                    allowed[row] = request.constraint.allowed()
                except Exception as error:
                    failed[row] = error
        # 2. Choose all tokens in one call.
        params = [request.prompt.params for request in requests]
        histories, generators = [r.ids for r in requests], [r.generator for r in requests]
        prompts = [len(request.prompt.input_ids) for request in requests]
        chosen = sample(logits, params, histories, generators, allowed, prompts)
        # One wait for the device. A row that is not finite has no token.
        tokens = torch.where(finite_rows(logits), chosen, NOT_FINITE).tolist()
        # 3. Tell the constraints.
        for row, request in enumerate(requests):
            if tokens[row] == NOT_FINITE:
                failed[row] = WorkError(self._why_not_finite())
                if request.slot is not None:  # in attention, one NaN spoils what stands before it as well
                    self._prefix_cache.hide(request.slot)
            elif request.constraint is not None and row not in failed and tokens[row] not in self._stops:
                try:
                    request.constraint.accept(tokens[row])
                except Exception as error:
                    failed[row] = error
        return [failed.get(row, token) for row, token in enumerate(tokens)]

    @signals_wait()  # a token that is chosen is delivered
    def _deliver_next_tokens(self, plan: Plan, logits: Tensor) -> None:
        """Choose the next tokens and deliver them to their requests."""
        due = [request for request, _ in plan if request.remaining == 0]
        for row, (request, token) in enumerate(zip(due, self._choose(due, logits), strict=True)):
            if isinstance(token, Exception):
                self._finish(request, "error", token)
                continue
            if request.prompt.num_beams > 1:
                if (answer := self._searches.add(request, logits[row])) is not None:
                    self._finish(request, answer.finish, tokens=tuple(answer.tokens))
                continue
            if token in self._stops:
                self._finish(request, "stop")
                continue
            self._generated_tokens += 1
            top_count = request.prompt.params.logprobs
            logprobs = None if top_count is None else (token_logprobs(logits[row], token, top_count),)
            request.append(token)
            # The last token needs no cell: the longest answer has one token more than there are cells.
            if request.length > request.max_cells:
                self._finish(request, "length", tokens=(token,), logprobs=logprobs)
            else:
                self._deliver(request, Delta((token,), logprobs, None, None, request.cached_tokens))

    def _why_not_finite(self) -> str:
        if self._not_finite is None:  # found once: it takes seconds for a large model
            self._not_finite = why_not_finite(self.model)
        return self._not_finite

    @signals_wait()
    def _finish(
        self,
        request: Request,
        finish: Finish,
        error: Exception | None = None,
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] | None = None,
    ) -> None:
        request = request.submitted
        if request.finish is not None:  # with another hypothesis of its search
            return
        if request.origin is not None:
            self._searches.end(request)
            self._generated_tokens += len(tokens)
            request.tokens += tokens
        self._scheduler.remove(request)
        request.finish = finish
        self._deliver(request, Delta(tokens, logprobs, finish, error, request.cached_tokens))

    def _deliver(self, request: Request, delta: Delta) -> None:
        try:
            request.deliver(delta)
        except Exception:  # a fault in the caller's function must not stop other requests
            _LOG.exception("the function that receives a request's tokens failed")
            request.cancelled = True
