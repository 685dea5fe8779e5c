"""What goes into the engine (`Prompt`), what it works on (`Request`) and what it delivers (`Delta`).

Shapes: T tokens of a prompt, M images, N image tokens of one image, D width.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pumice.config import IMAGE_TOKEN
from pumice.engine.cache import CacheSlot
from pumice.engine.params import SamplingParams
from pumice.engine.sampling import Constraint, TokenLogprob, token_logprobs
from pumice.errors import ContextOverflow, InputError, counted
from pumice.model.llava import Llava

Finish = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class PromptImage:
    """An image in a prompt: `count` placeholders, and a function that computes their image tokens.

    key: images with the same key have the same image tokens. encode: returns (count, D). It is called only if
    the prefix cache does not hold the image. It raises InputError if the image cannot be read.
    """

    key: str
    count: int
    encode: Callable[[], Tensor]


@dataclass(frozen=True)
class Prompt:
    """The token ids of a question, its images, and how the answer is sampled.

    input_ids: (T,) int64, with `IMAGE_TOKEN` as the placeholder of each image token. image_tokens: (M, N, D)
    or (total, D) if they are computed already; `images` is made from them. constraint: starts the constraint
    of one answer's tokens; None allows all tokens. prefix: what the chat format writes before an answer; it
    is no part of the answer's text. decode: returns the text of tokens, in which a beam search looks for
    stop texts; without it, no text ends a hypothesis.
    """

    input_ids: Tensor
    image_tokens: Tensor | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    images: tuple[PromptImage, ...] = ()
    constraint: Callable[[], Constraint] | None = None
    prefix: str = ""
    decode: Callable[[Sequence[int]], str] | None = None

    def __post_init__(self) -> None:
        if self.image_tokens is None:
            return
        if self.images:
            raise ValueError("give image_tokens or images, not both")
        tokens = self.image_tokens
        per_image = [tokens.flatten(0, -2)] if tokens.dim() < 3 else list(tokens)
        images = tuple(PromptImage(_hash(t), len(t), functools.partial(_identity, t)) for t in per_image)
        object.__setattr__(self, "images", images)

    @property
    def num_beams(self) -> int:
        """The hypotheses of a beam search; 1 is none. A constraint follows a single answer."""
        return self.params.num_beams if self.constraint is None else 1

    def holds_stop(self, tokens: Sequence[int]) -> bool:
        """Return whether the text of an answer's tokens holds one of the texts that end it."""
        if self.decode is None or not self.params.stop:
            return False
        text = self.decode(tokens).removeprefix(self.prefix)
        return any(stop in text for stop in self.params.stop)

    def check(self, vocabulary: int) -> None:
        """Raise ValueError unless images fill the placeholders and all other ids are in the vocabulary."""
        is_placeholder = self.input_ids == IMAGE_TOKEN
        placeholders, image_tokens = int(is_placeholder.sum()), sum(image.count for image in self.images)
        if placeholders != image_tokens:
            raise ValueError(
                f"input_ids hold {counted(placeholders, 'image placeholder')}, the pictures "
                f"give {counted(image_tokens, 'token')}"
            )
        text_ids = self.input_ids[~is_placeholder]
        if len(text_ids) and not (int(text_ids.min()) >= 0 and int(text_ids.max()) < vocabulary):
            raise ValueError(
                f"input_ids reach from {text_ids.min()} to {text_ids.max()}, "
                f"the vocabulary from 0 to {vocabulary - 1}"
            )

    def encode_images(self) -> Tensor | None:
        """Return the image tokens of all images (total, D), or None without images."""
        return torch.cat([image.encode() for image in self.images]) if self.images else None


def _identity(tokens: Tensor) -> Tensor:
    return tokens


def _hash(tokens: Tensor) -> str:
    values = tokens.detach().contiguous().cpu().view(torch.uint8).numpy()
    return hashlib.blake2b(values.tobytes(), digest_size=16).hexdigest()


def check_room(model: Llava, prompt: Prompt) -> None:
    """Raise InputError if the prompt is empty, or if the model's context has no room for an answer token."""
    length, context = len(prompt.input_ids), model.config.decoder.context
    if not length:
        raise InputError("the prompt has 0 tokens; give at least 1")
    if length >= context:
        message = (
            f"the prompt takes {length} tokens and leaves no room for an answer in a context of {context}; "
            "shorten the question or show fewer pictures"
        )
        raise ContextOverflow(message, length, context)


def cells_needed(prompt: Prompt, context: int, capacity: int) -> int:
    """Return the cells of the KV cache, one a token, that a prompt and its longest answer take.

    context: of the model, in tokens. Raise InputError if they are more than `capacity`, those of the cache.
    """
    length = len(prompt.input_ids)
    # The last token of an answer is never fed to the model, so it needs no cell.
    cells = min(context, length + prompt.params.max_new_tokens) - 1
    if length > capacity:
        message = (
            f"the prompt takes {length} tokens and the engine's cache holds {capacity}; "
            "shorten the question, show fewer pictures, or give the engine a larger cache"
        )
        raise ContextOverflow(message, length, capacity)
    if cells > capacity:
        raise InputError(
            f"a prompt of {length} tokens and an answer of up to {cells + 1 - length} do not fit in "
            f"a cache of {capacity} tokens; ask for at most {capacity + 1 - length}, "
            "or for a larger cache"
        )
    return cells


@dataclass(frozen=True)
class Delta:
    """What one step added to an answer.

    tokens: the new ones, without the stop token. logprobs: one for each of them, if the prompt's params ask
    for them. finish: None while the answer grows; then "stop" (a stop token, or a stop text that a beam
    search found), "length" (max_new_tokens or the model's context was reached), "cancelled", or "error".
    error: the exception behind "error". cached_tokens: prompt tokens that came from the prefix cache.
    """

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish: Finish | None = None
    error: Exception | None = None
    cached_tokens: int = 0


@dataclass(eq=False)
class Request:
    """One prompt in the engine, and how far it is computed.

    Any thread may read `tokens`, `prompt_logprobs` and `finish`. Only the engine reads and writes the others.
    """

    prompt: Prompt
    deliver: Callable[[Delta], None]
    generator: torch.Generator
    max_cells: int  # prompt and longest answer, without its last token, which is never fed back
    tokens: list[int] = field(default_factory=list)
    # Of the prompt's tokens but the first, if its params ask for them; complete with the first token.
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None
    cancelled: bool = False
    cached_tokens: int = 0
    admitted: bool = False  # stays True when the request is preempted
    slot: CacheSlot | None = None  # while the request runs
    origin: Request | None = None  # the request that was submitted, once its beam search has begun
    # Image tokens of the next step, and the offsets of their placeholders in it.
    step_images: tuple[np.ndarray, Tensor] | None = None
    # By image key, until the prompt is computed.
    _image_tokens: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        start_constraint = self.prompt.constraint
        self.constraint = start_constraint() if start_constraint is not None else None
        prompt_ids = self.prompt.input_ids.numpy()
        max_answer = self.max_cells + 1 - len(prompt_ids)
        self.length = len(prompt_ids)  # tokens of the prompt and, so far, of the answer
        # Copy the prompt only: pages that are not written take no memory, and many answers end early.
        self._ids, self._token_hashes = (np.empty(self.length + max_answer, np.int64) for _ in range(2))
        self._ids[: self.length] = self._token_hashes[: self.length] = prompt_ids
        self.placeholders = np.flatnonzero(prompt_ids == IMAGE_TOKEN)
        # Text tokens are their own hashes. Placeholders all have the same id, so their hashes name the image.
        image_hashes = [image_token_hashes(image.key, image.count) for image in self.prompt.images]
        if image_hashes:
            self._token_hashes[self.placeholders] = np.concatenate(image_hashes)

    @property
    def submitted(self) -> Request:
        """The request whose hypothesis this is; otherwise itself."""
        return self if self.origin is None else self.origin

    @property
    def ids(self) -> np.ndarray:
        """The token ids of prompt and answer: (length,)."""
        return self._ids[: self.length]

    @property
    def token_hashes(self) -> np.ndarray:
        """The ids, with each placeholder replaced by a hash of its image: (length,)."""
        return self._token_hashes[: self.length]

    @property
    def computed(self) -> int:
        """Tokens whose keys and values are in the KV cache."""
        slot = self.slot  # read once: other threads may ask
        return slot.length if slot is not None else 0

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next token can be chosen; 1 during decoding."""
        return self.length - self.computed

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are still to be computed."""
        wanted = len(self.prompt.input_ids) - 1
        return self.prompt.params.prompt_logprobs is not None and len(self.prompt_logprobs) < wanted

    def score(self, logits: Tensor) -> None:
        """Keep the log-probabilities of the next tokens of the prompt, which these logits (n, V) predict."""
        start, top = self.computed, self.prompt.params.prompt_logprobs or 0
        tokens = self.ids[start + 1 : start + 1 + len(logits)].tolist()
        self.prompt_logprobs[start:] = [
            token_logprobs(row, token, top) for row, token in zip(logits, tokens, strict=True)
        ]

    def encode(self, image: PromptImage) -> Tensor:
        """Return the image's tokens (N, D). They are computed once, even if several chunks need them.

        Raise ValueError if they are not as many as its placeholders.
        """
        if image.key not in self._image_tokens:
            tokens = image.encode()
            if len(tokens) != image.count:
                raise ValueError(
                    f"a picture has {counted(image.count, 'placeholder')} and "
                    f"{counted(len(tokens), 'image token')}"
                )
            self._image_tokens[image.key] = tokens
        return self._image_tokens[image.key]

    def next_image_tokens(self, count: int) -> tuple[np.ndarray, Tensor] | None:
        """Return the placeholders among the next `count` tokens, as offsets, and their image tokens."""
        start = self.computed
        first, last = np.searchsorted(self.placeholders, (start, start + count))
        if first == last:
            return None
        # Placeholders `first` to `last` of all images: take from each image the part that lies in this range.
        parts, preceding = [], 0
        for image in self.prompt.images:
            lower, upper = max(first - preceding, 0), min(last - preceding, image.count)
            if lower < upper:
                parts.append(self.encode(image)[lower:upper])
            preceding += image.count
        return self.placeholders[first:last] - start, torch.cat(parts)

    def continued(self, token: int) -> Request:
        """Return a request that goes on with this token, for another hypothesis of its search."""
        other = copy.copy(self)
        # Copy only what is filled, as above.
        other._ids, other._token_hashes = np.empty_like(self._ids), np.empty_like(self._token_hashes)
        other.ids[:], other.token_hashes[:] = self.ids, self.token_hashes
        other.tokens, other.slot, other.admitted = [*self.tokens], None, True
        other.append(token)
        return other

    def append(self, token: int) -> None:
        """Add a token to the answer."""
        self._ids[self.length] = self._token_hashes[self.length] = token
        self.length += 1
        self._image_tokens.clear()
        self.tokens.append(token)


def image_token_hashes(image_key: str, count: int) -> np.ndarray:
    """Return the hashes of an image's tokens: (count,), negative, so that no text token has the same hash."""
    first = int.from_bytes(hashlib.blake2b(image_key.encode(), digest_size=8).digest(), "little") >> 2
    return -1 - (first + np.arange(count, dtype=np.int64))
