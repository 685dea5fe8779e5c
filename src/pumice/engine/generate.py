"""Prompts become tokens: prefill, then one token per step for every answer in progress.

Knows: a Llava, its KV cache, sampling. Does not know: text, templates, pictures; a prompt is ids and
image tokens. `naive_generate` is the reference that everything faster must equal.

Shapes: T tokens of a prompt, M pictures, N image tokens, D width, B answers in progress.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pumice.engine.sampling import SamplingParams, sample
from pumice.errors import InputError
from pumice.model.cache import KVCache
from pumice.model.llava import Llava

_ROOM = 128  # the cache grows by multiples of this many tokens


@dataclass(frozen=True)
class Prompt:
    """input_ids (T,) int64 with placeholders, and the pictures' tokens in order, (M, N, D) or (total, D)."""

    input_ids: Tensor
    image_tokens: Tensor | None = None
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass(eq=False)
class Answer:
    """One prompt's tokens so far, without the token that ends them.

    finish: "stop" (the model ended it, or whoever reads it did, by `end`), "length" (max_new_tokens or
    the model's context was reached), None while it grows.
    """

    index: int  # of its prompt
    prompt: Prompt
    ids: list[int] = field(default_factory=list)
    finish: str | None = None

    def end(self) -> None:
        """No more tokens, please: a stop string was met, say."""
        self.finish = "stop"

    @property
    def history(self) -> list[int]:
        return [*self.prompt.input_ids.tolist(), *self.ids]


def check_room(model: Llava, prompt: Prompt) -> None:
    """Raise InputError unless the model's context holds the prompt and at least one more token."""
    length, context = len(prompt.input_ids), model.config.decoder.context
    if length >= context:
        raise InputError(
            f"the prompt takes {length} tokens and leaves no room for an answer in a context of {context}; "
            "shorten the question or show fewer pictures"
        )


@torch.inference_mode()
def naive_generate(model: Llava, prompt: Prompt) -> list[int]:
    """One answer without a cache: the whole sequence runs again for every token."""
    answer = Answer(0, prompt)
    generator = prompt.params.generator(model.device)
    while answer.finish is None:
        ids = torch.tensor([answer.history], device=model.device)
        hidden = model(ids, prompt.image_tokens)[:, -1]
        logits = model.decoder.logits(hidden)
        _extend(model, answer, int(sample(logits, prompt.params, [answer.history], [generator])))
    return answer.ids


@torch.inference_mode()
def generate(
    model: Llava, prompts: Iterable[Prompt], *, slots: int = 1
) -> Iterator[tuple[Answer, int | None]]:
    """Answer prompts, at most `slots` at a time; yields (answer, its next token), None at its end.

    A prompt is taken from the iterable when a slot is free and prefilled alone; answers in progress are
    decoded together, and one that ends makes room for the next. Answers of a greedy or seeded prompt do
    not depend on their neighbours, to rounding. Raises InputError when a prompt leaves no room in the
    model's context for an answer.
    """
    waiting = iter(prompts)
    free = deque(range(slots))
    running: list[_Running] = []
    cache = KVCache(model.config.decoder, slots, 0, model.device, model.dtype)
    count, exhausted = 0, False
    while True:
        while free and not exhausted:
            prompt = next(waiting, None)
            if prompt is None:
                exhausted = True
                break
            row = _Running(Answer(count, prompt), free.popleft(), prompt.params.generator(model.device))
            count += 1
            running.append(row)
            yield from _deliver(model, [row], _prefill(model, cache, row))
        for row in [row for row in running if row.answer.finish is not None]:
            running.remove(row)
            free.append(row.slot)
            yield row.answer, None
        if running:
            yield from _deliver(model, running, _decode(model, cache, running))
        elif exhausted:
            return


@dataclass(eq=False)
class _Running:
    answer: Answer
    slot: int
    generator: torch.Generator


def _prefill(model: Llava, cache: KVCache, row: _Running) -> Tensor:
    """The prompt's logits after its last token: (1, V)."""
    prompt = row.answer.prompt
    check_room(model, prompt)
    ids = prompt.input_ids.to(model.device)[None]
    length, context = ids.shape[1], model.config.decoder.context
    # The last token of an answer is never fed back, so its key and value need no room.
    needed = min(context, length + prompt.params.max_new_tokens - 1)
    cache.reserve(-(-needed // _ROOM) * _ROOM)
    cache.lengths[row.slot] = 0
    positions = cache.positions([row.slot], length)
    hidden = model(ids, prompt.image_tokens, positions, cache.attend([row.slot], length))
    return model.decoder.logits(hidden[:, -1])


def _decode(model: Llava, cache: KVCache, running: list[_Running]) -> Tensor:
    """Feed each answer's last token: logits (B, V)."""
    tokens = torch.tensor([[row.answer.ids[-1]] for row in running], device=model.device)
    slots = [row.slot for row in running]
    positions = cache.positions(slots, 1)
    hidden = model.decoder(model.decoder.embed(tokens), positions, cache.attend(slots, 1))
    return model.decoder.logits(hidden[:, -1])


def _deliver(model: Llava, rows: list[_Running], logits: Tensor) -> Iterator[tuple[Answer, int]]:
    for number, row in enumerate(rows):
        params = row.answer.prompt.params
        history = [row.answer.history if params.repetition_penalty != 1 else []]
        token = int(sample(logits[number : number + 1], params, history, [row.generator]))
        if _extend(model, row.answer, token):
            yield row.answer, token


def _extend(model: Llava, answer: Answer, token: int) -> bool:
    """Add a token unless it ends the answer; say whether it was added."""
    if token in model.config.stop_token_ids:
        answer.finish = "stop"
        return False
    answer.ids.append(token)
    full = len(answer.prompt.input_ids) + len(answer.ids) >= model.config.decoder.context
    if full or len(answer.ids) >= answer.prompt.params.max_new_tokens:
        answer.finish = "length"
    return True
