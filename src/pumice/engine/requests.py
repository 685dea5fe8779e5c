"""A request to the engine on its way, and what its owner hears of it.

Knows: a prompt's ids, and how far they are computed. Does not know: the model, text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pumice.config import IMAGE_TOKEN
from pumice.engine.generate import Picture, Prompt
from pumice.engine.prefix import Region
from pumice.engine.sampling import TokenLogprob

Finish = Literal["stop", "length", "cancelled", "error"]


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
    region: Region | None = None  # while it runs
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

    def look(self, picture: Picture) -> Tensor:
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
