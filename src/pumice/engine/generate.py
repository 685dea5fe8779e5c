"""What the engine is asked, and the reference that it must equal.

Knows: a Llava, sampling. Does not know: text, templates, pixels; a prompt is ids and image tokens.
`naive_generate` runs the whole sequence again for every token; `generate` is the engine as one iterator.

Shapes: T tokens of a prompt, M pictures, N image tokens, D width.
"""

from __future__ import annotations

import functools
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pumice.config import IMAGE_TOKEN
from pumice.engine.sampling import Constraint, SamplingParams, sample
from pumice.errors import InputError
from pumice.model.llava import Llava

if TYPE_CHECKING:
    from pumice.engine.requests import Delta


@dataclass(frozen=True)
class Picture:
    """A picture in a prompt: `count` placeholders, whose image tokens (count, D) are asked for when needed.

    key: equal for pictures with equal image tokens, different for others. look: is not called when the
    prefix cache holds what it would give; raises InputError when the picture cannot be read.
    """

    key: str
    count: int
    look: Callable[[], Tensor]


@dataclass(frozen=True)
class Prompt:
    """input_ids (T,) int64 with placeholders, and its pictures in order.

    image_tokens: (M, N, D) or (total, D), where they are there already; they become `pictures`.
    constraint: begins one answer's constraint on its tokens; any may come when None.
    """

    input_ids: Tensor
    image_tokens: Tensor | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    pictures: tuple[Picture, ...] = ()
    constraint: Callable[[], Constraint] | None = None

    def __post_init__(self) -> None:
        if self.image_tokens is None:
            return
        if self.pictures:
            raise ValueError("give image_tokens or pictures, not both")
        given = self.image_tokens
        separate = [given.flatten(0, -2)] if given.dim() < 3 else list(given)
        made = tuple(Picture(_fingerprint(t), len(t), functools.partial(_same, t)) for t in separate)
        object.__setattr__(self, "pictures", made)

    def check(self, vocabulary: int) -> None:
        """Raise ValueError unless the pictures fill the placeholders and the other ids are tokens."""
        here = self.input_ids == IMAGE_TOKEN
        wanted, given = int(here.sum()), sum(picture.count for picture in self.pictures)
        if wanted != given:
            raise ValueError(f"input_ids hold {wanted} image placeholders, the pictures give {given} tokens")
        text = self.input_ids[~here]
        if len(text) and not (int(text.min()) >= 0 and int(text.max()) < vocabulary):
            raise ValueError(f"input_ids reach from {text.min()} to {text.max()}, the vocabulary from 0 to "
                             f"{vocabulary - 1}")  # fmt: skip

    def look(self) -> Tensor | None:
        """The image tokens of all pictures (total, D); None without pictures."""
        return torch.cat([picture.look() for picture in self.pictures]) if self.pictures else None


def _note(events: deque[tuple[int, Delta]], number: int, delta: Delta) -> None:
    events.append((number, delta))


def _same(tokens: Tensor) -> Tensor:
    return tokens


def _fingerprint(tokens: Tensor) -> str:
    values = tokens.detach().contiguous().cpu().view(torch.uint8).numpy()
    return hashlib.blake2b(values.tobytes(), digest_size=16).hexdigest()


def check_room(model: Llava, prompt: Prompt) -> None:
    """Raise InputError unless the prompt has tokens, and the model's context room for at least one more."""
    length, context = len(prompt.input_ids), model.config.decoder.context
    if not length:
        raise InputError("the prompt has 0 tokens; give at least 1")
    if length >= context:
        raise InputError(
            f"the prompt takes {length} tokens and leaves no room for an answer in a context of {context}; "
            "shorten the question or show fewer pictures"
        )


@torch.inference_mode()
def naive_generate(model: Llava, prompt: Prompt) -> list[int]:
    """One answer without a cache: the whole sequence runs again for every token."""
    params, context = prompt.params, model.config.decoder.context
    generator, image_tokens = params.generator(model.device), prompt.look()
    constraint = prompt.constraint() if prompt.constraint is not None else None
    history = prompt.input_ids.tolist()
    answer: list[int] = []
    while len(answer) < params.max_new_tokens and len(history) < context:
        hidden = model(torch.tensor([history], device=model.device), image_tokens)[:, -1]
        allowed = constraint.allowed() if constraint is not None else None
        token = int(sample(model.decoder.logits(hidden), params, [history], [generator], allowed))
        if token in model.config.stop_token_ids:
            break
        if constraint is not None:
            constraint.accept(token)
        answer.append(token)
        history.append(token)
    return answer


def generate(model: Llava, prompts: Iterable[Prompt], *, slots: int = 1) -> Iterator[tuple[int, int | None]]:
    """Answer prompts, at most `slots` at a time; yields (number of the prompt, its next token or None).

    None comes once, at the answer's end. A prompt is taken from the iterable when a slot is free. Raises
    InputError when a prompt leaves no room for an answer, and what a picture's `look` raises.
    """
    from pumice.engine.engine import Engine

    engine = Engine(model, slots=slots)
    events: deque[tuple[int, Delta]] = deque()
    waiting, open_requests = enumerate(prompts), 0
    exhausted = False
    while True:
        while open_requests < slots and not exhausted:
            number, prompt = next(waiting, (-1, None))
            if prompt is None:
                exhausted = True
                break
            engine.submit(prompt, functools.partial(_note, events, number))
            open_requests += 1
        if not open_requests:
            return
        engine.step()
        while events:
            number, delta = events.popleft()
            if delta.error is not None:
                raise delta.error
            yield from ((number, token) for token in delta.tokens)
            if delta.finish is not None:
                open_requests -= 1
                yield number, None
