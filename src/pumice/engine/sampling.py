"""Sampling chooses the next token from the logits.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pumice.errors import InputError


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is sampled. The defaults are greedy, and so reproducible.

    Raises InputError if a value is outside its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0 takes the most likely token
    top_p: float = 1.0  # the smallest set of tokens with this probability (arXiv 1904.09751); 1 is off
    top_k: int = 0  # the k most likely tokens; 0 is off
    repetition_penalty: float = 1.0  # for tokens of prompt and answer (arXiv 1909.05858); 1 is off
    stop: tuple[str, ...] = ()  # texts; an answer ends before the first of them
    seed: int | None = None  # None gives another answer each time
    logprobs: int | None = None  # return log-probabilities of each token and of this many most likely ones

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        integers: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "top_k": self.top_k,
            "seed": self.seed,
            "logprobs": self.logprobs,
        }
        for name, value in integers.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise InputError(f"{name} is {value!r}; give a whole number")
        numbers: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "repetition_penalty": self.repetition_penalty,
        }
        for name, value in numbers.items():
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise InputError(f"{name} is {value!r}; give a number")
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "1 or more")
        _require(self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "more than 0, at most 1")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        _require(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "more than 0")
        if self.seed is not None:
            _require(0 <= self.seed < 2**63, "seed", self.seed, "0 or more, below 2**63")
        if self.logprobs is not None:
            _require(self.logprobs >= 0, "logprobs", self.logprobs, "0 or more")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise InputError(f"stop is {list(self.stop)!r}; give texts that are not empty")

    def generator(self, device: torch.device) -> torch.Generator:
        """Return the random generator of one answer. It does not depend on other answers."""
        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


class Constraint(Protocol):
    """Restricts the tokens of one answer, one after another."""

    def allowed(self) -> Tensor:
        """Return which tokens may come next: (V,) bool, at least one of them True."""
        ...

    def accept(self, token: int) -> None:
        """Record the chosen token. Not called for a stop token."""
        ...


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability (natural logarithm), before temperature and penalties.

    top: (token, log-probability) of the most likely tokens, the most likely first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprobs(logits: Tensor, token: int, count: int) -> TokenLogprob:
    """Return the log-probabilities of `token` and of the `count` most likely tokens; logits: (V,)."""
    logprobs = logits.float().log_softmax(-1)
    best = logprobs.topk(min(count, len(logprobs)))
    top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return TokenLogprob(token, float(logprobs[token]), tuple(top))


def sample(
    logits: Tensor,
    params: SamplingParams,
    history: Sequence[Sequence[int]],
    generators: Sequence[torch.Generator],
    allowed: Tensor | None = None,
) -> Tensor:
    """Return the next token of each row (B,); logits: (B, V).

    history: the tokens so far, row by row; negative ones (image placeholders) do not count. generators: one
    for each row, so that a row's token does not depend on the other rows. allowed: (B, V) or (V,) bool; None
    allows all tokens.
    """
    if allowed is not None:
        logits = logits.masked_fill(~allowed.to(logits.device), float("-inf"))
    if params.repetition_penalty != 1:
        logits = penalise(logits, params.repetition_penalty, history)
    if params.temperature == 0:
        return logits.argmax(-1)
    probabilities = nucleus(logits, params).softmax(-1)
    tokens = [
        torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities, generators, strict=True)
    ]
    return torch.cat(tokens)


def penalise(logits: Tensor, penalty: float, history: Sequence[Sequence[int]]) -> Tensor:
    """Return logits with those of earlier tokens lowered: positive ones divided, negative ones multiplied."""
    logits = logits.to(torch.float32, copy=True)
    for row, tokens in enumerate(history):
        ids = torch.tensor(sorted({n for n in tokens if n >= 0}), device=logits.device, dtype=torch.long)
        values = logits[row, ids]
        logits[row, ids] = torch.where(values > 0, values / penalty, values * penalty)
    return logits


def nucleus(logits: Tensor, params: SamplingParams) -> Tensor:
    """Apply temperature, top-k and top-p, in this order. Return fp32 logits (B, V); -inf is never sampled."""
    logits = logits.float()
    # Subtract the maximum, so that a tiny temperature gives no infinity. The softmax stays the same.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(params.temperature, 1e-20)
    if 0 < params.top_k < logits.shape[-1]:
        smallest = logits.topk(params.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if params.top_p < 1:
        ordered, order = logits.sort(-1)
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - params.top_p
        drop[:, -1] = False  # the most likely token always stays
        logits = logits.masked_fill(drop.scatter(-1, order, drop), float("-inf"))
    return logits


def _require(holds: bool, name: str, value: Any, remedy: str) -> None:
    if not holds:
        raise InputError(f"{name} is {value}; give {remedy}")
