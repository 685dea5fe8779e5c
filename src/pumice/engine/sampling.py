"""Which token comes next, given the logits.

Knows: numbers that a person may set, and logits. Does not know: the model, text.

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
    """How an answer is drawn. The defaults are greedy and hence reproducible.

    Raises InputError on a value outside its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0 takes the likeliest token
    top_p: float = 1.0  # the smallest set of tokens with this probability (arXiv 1904.09751); 1 is off
    top_k: int = 0  # the likeliest k tokens; 0 is off
    repetition_penalty: float = 1.0  # of every token seen so far (arXiv 1909.05858); 1 is off
    stop: tuple[str, ...] = ()  # an answer ends before any of these
    seed: int | None = None  # None draws differently each time
    logprobs: int | None = None  # also give each token's log probability, and of so many likeliest ones

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        whole: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "top_k": self.top_k,
            "seed": self.seed,
            "logprobs": self.logprobs,
        }
        for name, value in whole.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise InputError(f"{name} is {value!r}; give a whole number")
        real: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "repetition_penalty": self.repetition_penalty,
        }
        for name, value in real.items():
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
        """The random numbers of one answer, the same for the same seed whatever else is answered."""
        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


class Constraint(Protocol):
    """What one answer may say, token by token."""

    def allowed(self) -> Tensor:
        """(V,) bool: the tokens that may come next; at least one."""
        ...

    def accept(self, token: int) -> None:
        """The next token; not called with one that ends the answer."""
        ...


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model held a token, before temperature and penalties: natural logarithms.

    top: (token, log probability) of the likeliest ones, likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprobs(logits: Tensor, token: int, count: int) -> TokenLogprob:
    """Logits (V,) -> the log probability of `token` and of the `count` likeliest."""
    values = logits.float().log_softmax(-1)
    best = values.topk(min(count, len(values)))
    top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return TokenLogprob(token, float(values[token]), tuple(top))


def sample(
    logits: Tensor,
    params: SamplingParams,
    history: Sequence[Sequence[int]],
    generators: Sequence[torch.Generator],
    allowed: Tensor | None = None,
) -> Tensor:
    """Logits (B, V) -> the next token of each row (B,).

    history: the tokens seen so far, row by row; negative ones (image placeholders) do not count. Each
    row draws from its own generator, so that what it gives does not depend on its neighbours.
    allowed: (B, V) or (V,) bool, the tokens that may come; any when None.
    """
    if allowed is not None:
        logits = logits.masked_fill(~allowed.to(logits.device), float("-inf"))
    if params.repetition_penalty != 1:
        logits = penalise(logits, params.repetition_penalty, history)
    if params.temperature == 0:
        return logits.argmax(-1)
    weights = nucleus(logits, params).softmax(-1)
    draws = [torch.multinomial(row, 1, generator=g) for row, g in zip(weights, generators, strict=True)]
    return torch.cat(draws)


def penalise(logits: Tensor, penalty: float, history: Sequence[Sequence[int]]) -> Tensor:
    """Divide the positive logits of tokens already seen, multiply the negative ones."""
    logits = logits.to(torch.float32, copy=True)
    for row, seen in enumerate(history):
        ids = torch.tensor(sorted({n for n in seen if n >= 0}), device=logits.device, dtype=torch.long)
        values = logits[row, ids]
        logits[row, ids] = torch.where(values > 0, values / penalty, values * penalty)
    return logits


def nucleus(logits: Tensor, params: SamplingParams) -> Tensor:
    """Logits (B, V) in fp32 after temperature, top-k and top-p, in this order; -inf = never drawn."""
    logits = logits.float()
    # From the maximum, so that no temperature is too small to divide by; the softmax does not see it.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(params.temperature, 1e-20)
    if 0 < params.top_k < logits.shape[-1]:
        least = logits.topk(params.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if params.top_p < 1:
        ordered, order = logits.sort(-1)
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - params.top_p
        drop[:, -1] = False  # the likeliest always stays
        logits = logits.masked_fill(drop.scatter(-1, order, drop), float("-inf"))
    return logits


def _require(holds: bool, name: str, value: Any, remedy: str) -> None:
    if not holds:
        raise InputError(f"{name} is {value}; give {remedy}")
