"""Generate answers without a cache, as the reference for the engine, and with the engine, as an iterator."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from pumice.engine.engine import Engine
from pumice.engine.requests import Delta, Prompt
from pumice.engine.sampling import random_generator, sample
from pumice.model.finite import check_finite
from pumice.model.llava import Llava


def _append(events: deque[tuple[int, Delta]], number: int, delta: Delta) -> None:
    events.append((number, delta))


@torch.inference_mode()
def naive_generate(model: Llava, prompt: Prompt) -> list[int]:
    """Generate one answer without a cache: run the whole sequence again for every token.

    There is no beam search here: `num_beams` has no effect.
    """
    params, context = prompt.params, model.config.decoder.context
    generator, image_tokens = random_generator(params), prompt.encode_images()
    constraint = prompt.constraint() if prompt.constraint is not None else None
    history = prompt.input_ids.tolist()
    answer: list[int] = []
    while len(answer) < params.max_new_tokens and len(history) < context:
        hidden = model(torch.tensor([history], device=model.device), image_tokens)[:, -1]
        logits = model.decoder.logits(hidden)
        allowed = constraint.allowed() if constraint is not None else None
        check_finite(model, logits)
        prompt_lengths = [len(prompt.input_ids)]
        token = int(sample(logits, [params], [np.array(history)], [generator], [allowed], prompt_lengths))
        if token in model.config.stop_token_ids:
            break
        if constraint is not None:
            constraint.accept(token)
        answer.append(token)
        history.append(token)
    return answer


def generate(
    model: Llava, prompts: Iterable[Prompt], *, slots: int = 1, cache_tokens: int | None = None
) -> Iterator[tuple[int, int | None]]:
    """Answer prompts, at most `slots` at a time. Yield (index of the prompt, its next token, or None at its
    end).

    The next prompt is taken from the iterable when a slot is free. cache_tokens: as in `Engine`. Raise
    InputError if a prompt leaves no room for an answer, and the exceptions of an image's `encode`.
    """
    engine = Engine(model, slots=slots, cache_tokens=cache_tokens)
    events: deque[tuple[int, Delta]] = deque()
    upcoming, open_requests = enumerate(prompts), 0
    while True:
        # 1. Fill the free slots.
        for number, prompt in itertools.islice(upcoming, slots - open_requests):
            engine.submit(prompt, functools.partial(_append, events, number))
            open_requests += 1
        if not open_requests:
            return
        # 2. Compute a step, and yield what it delivered.
        engine.step()
        while events:
            number, delta = events.popleft()
            if delta.error is not None:
                raise delta.error
            yield from ((number, token) for token in delta.tokens)
            if delta.finish is not None:
                open_requests -= 1
                yield number, None
