"""What the engine is asked, a request on its way, and what its owner hears of it.

Knows: a prompt as ids and image tokens, and how far it is computed. Does not know: text, templates, pixels.

Shapes: T tokens of a prompt, M pictures, N image tokens, D width.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pumice.config import IMAGE_TOKEN
from pumice.engine.cache import CacheSlot
from pumice.engine.sampling import Constraint, SamplingParams, TokenLogprob
from pumice.errors import InputError
from pumice.model.llava import Llava

Finish = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class PromptImage:
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
    pictures: tuple[PromptImage, ...] = ()
    constraint: Callable[[], Constraint] | None = None

    def __post_init__(self) -> None:
        if self.image_tokens is None:
            return
        if self.pictures:
            raise ValueError("give image_tokens or pictures, not both")
        given = self.image_tokens
        separate = [given.flatten(0, -2)] if given.dim() < 3 else list(given)
        made = tuple(PromptImage(_fingerprint(t), len(t), functools.partial(_same, t)) for t in separate)
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


@dataclass(frozen=True)
class Delta:
    """What a step added to an answer.

    tokens: the new ones, never the one that ends the answer. logprobs: of each of them, where the prompt's
    params ask for them. finish: None while the answer grows; "stop" (a stop token), "length"
    (max_new_tokens or the model's context was reached), "cancelled", or "error". error: what went wrong
    then. cached_tokens: of the prompt, those that were not computed for it.
    """

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish: Finish | None = None
    error: Exception | None = None
    cached_tokens: int = 0


@dataclass(eq=False)
class Request:
    """One prompt in the engine. tokens and finish may be read at any time, the rest is the engine's."""

    prompt: Prompt
    deliver: Callable[[Delta], None]
    generator: torch.Generator
    limit: int  # tokens that the cache must hold at most: the last one of an answer is never fed back
    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None
    cancelled: bool = False
    cached_tokens: int = 0
    admitted: bool = False  # at least once, though it may wait again
    region: CacheSlot | None = None  # while it runs
    shown: tuple[np.ndarray, Tensor] | None = None  # image tokens of the next step, and where they go
    _seen: dict[str, Tensor] = field(default_factory=dict)  # image tokens of pictures being computed

    def __post_init__(self) -> None:
        made = self.prompt.constraint
        self.constraint = made() if made is not None else None
        given = self.prompt.input_ids.numpy()
        room = self.limit + 1 - len(given)
        self.count = len(given)  # tokens known: the prompt's and the answer's
        self._ids = np.concatenate((given, np.empty(room, np.int64)))
        self._keys = np.concatenate((given, np.empty(room, np.int64)))
        self.placeholders = np.flatnonzero(given == IMAGE_TOKEN)
        names = [picture_keys(picture.key, picture.count) for picture in self.prompt.pictures]
        if names:
            self._keys[self.placeholders] = np.concatenate(names)

    @property
    def ids(self) -> np.ndarray:
        return self._ids[: self.count]

    @property
    def keys(self) -> np.ndarray:
        """The ids with placeholders replaced by what tells pictures apart."""
        return self._keys[: self.count]

    @property
    def computed(self) -> int:
        return self.region.length if self.region is not None else 0

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one is known; 1 while decoding."""
        return self.count - self.computed

    def look(self, picture: PromptImage) -> Tensor:
        """The picture's image tokens (N, D), asked for once, however many chunks they are computed in."""
        if picture.key not in self._seen:
            self._seen[picture.key] = picture.look()
        return self._seen[picture.key]

    def add(self, token: int) -> None:
        self._ids[self.count] = self._keys[self.count] = token
        self.count += 1
        self._seen.clear()
        self.tokens.append(token)


def picture_keys(name: str, count: int) -> np.ndarray:
    """Keys of a picture's tokens: negative, so that no token of text has them."""
    first = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 2
    return -1 - (first + np.arange(count, dtype=np.int64))
