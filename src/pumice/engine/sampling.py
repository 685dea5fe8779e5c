"""Sampling chooses the next token from the logits.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pumice.engine.params import SamplingParams
from pumice.model.transfer import numbers_on, to_device

LIKELIEST = 64  # tokens that top_p and min_p select first
TRIES = 16  # draws from all tokens for one that top_p and min_p allow, before they are sorted
BLOCK = 64  # tokens of the vocabulary that are searched for likely ones together


def random_generator(params: SamplingParams) -> torch.Generator:
    """Return the random generator of one answer. It depends on no other answer, and on no device."""
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
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
    params: Sequence[SamplingParams],
    histories: Sequence[np.ndarray],
    generators: Sequence[torch.Generator],
    allowed: Sequence[Tensor | None] | None = None,
    prompt_lengths: Sequence[int] | None = None,
) -> Tensor:
    """Return the next token of each row (B,); logits: (B, V).

    params, histories, generators, allowed: one for each row. A row's token does not depend on the others.
    history: the token ids so far; negative ones (image placeholders) do not count. allowed: (V,) bool, or
    None for all tokens. prompt_lengths: how many tokens of each history come before the answer; None for 0.
    """
    count = len(params)
    logits = _restrict(logits, params, histories, allowed or [None] * count, prompt_lengths or [0] * count)
    drawn = [row for row, one in enumerate(params) if one.temperature]
    if not drawn:
        return logits.argmax(-1)
    temperatures = [params[row].temperature for row in drawn]
    probabilities = likelihoods(_take(logits, drawn), temperatures)
    tokens = _draw(probabilities, [params[row] for row in drawn], [generators[row] for row in drawn])
    if len(drawn) == count:
        return tokens
    return logits.argmax(-1).index_copy_(0, numbers_on(logits.device, drawn), tokens)


def _restrict(
    logits: Tensor,
    params: Sequence[SamplingParams],
    histories: Sequence[np.ndarray],
    allowed: Sequence[Tensor | None],
    prompt_lengths: Sequence[int],
) -> Tensor:
    """Return a copy of the logits in which forbidden tokens are -inf and repeated ones are penalised."""
    if not any(map(_changes, params, allowed)):
        return logits
    logits = logits.to(torch.float32, copy=True)
    rows = zip(params, histories, allowed, prompt_lengths, strict=True)
    for row, (one, history, mask, prompt_length) in enumerate(rows):
        if mask is not None:
            logits[row].masked_fill_(to_device(~mask, logits.device), float("-inf"))
        if one.repetition_penalty != 1:
            penalise(logits[row], one.repetition_penalty, history)
        if one.frequency_penalty or one.presence_penalty:
            ids, counts = np.unique(history[prompt_length:], return_counts=True)
            lower = one.presence_penalty + one.frequency_penalty * torch.from_numpy(counts)
            logits[row, to_device(torch.from_numpy(ids), logits.device)] -= to_device(lower, logits.device)
    return logits


def _changes(params: SamplingParams, mask: Tensor | None) -> bool:
    """Return whether a row's logits are changed before a token is chosen."""
    penalties = params.repetition_penalty - 1, params.frequency_penalty, params.presence_penalty
    return mask is not None or any(penalties)


def penalise(logits: Tensor, penalty: float, history: np.ndarray) -> None:
    """Lower the logits (V,) of earlier tokens in place: divide positive ones, multiply negative ones."""
    ids = to_device(torch.from_numpy(history[history >= 0]), logits.device)
    values = logits[ids]
    # A token that occurs twice is written twice with the same number.
    logits[ids] = torch.where(values > 0, values / penalty, values * penalty)


def likelihoods(logits: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Return the probabilities (B, V) in fp32 of logits (B, V) at each row's temperature."""
    logits = logits.float()
    # Subtract the maximum, so that a tiny temperature gives no infinity. The softmax stays the same.
    logits = logits - logits.amax(-1, keepdim=True)
    # Nor may a temperature be infinite in fp32: what is forbidden, -inf, would be divided to NaN.
    divisors = numbers_on(logits.device, [min(max(t, 1e-20), 1e30) for t in temperatures], logits.dtype)
    return logits.div_(divisors[:, None]).softmax(-1)


def _draw(
    probabilities: Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator]
) -> Tensor:
    """Draw a token of each row (B,) from probabilities (B, V)."""
    # 1. One random number per row, whatever the number of tokens to choose from.
    device, vocabulary = probabilities.device, probabilities.shape[1]
    numbers = to_device(torch.cat([torch.rand(1, generator=generator) for generator in generators]), device)
    if device.type != "cpu":
        return _draw_sorted(probabilities, params, numbers)
    tokens = torch.empty(len(params), dtype=torch.long)
    # 2. Rows without a limit draw from the whole vocabulary.
    limited = {row for row, one in enumerate(params) if one.top_k or one.top_p < 1 or one.min_p > 0}
    if rows := [row for row in range(len(params)) if row not in limited]:
        tokens[rows] = _pick(_take(probabilities, rows), numbers[rows])
    # 3. Others select the likeliest tokens first: few hold most of the probability. How many are selected
    #    depends on the row alone.
    wide = []
    counts = {row: min(vocabulary, params[row].top_k or LIKELIEST) for row in sorted(limited)}
    for count in sorted(set(counts.values())):
        rows = [row for row in counts if counts[row] == count]
        best, ids = likeliest(_take(probabilities, rows), count)
        kept = keep([params[row] for row in rows], best)
        picked = _pick(best * kept, numbers[rows])
        tokens[rows] = ids.gather(1, picked[:, None])[:, 0]
        # 4. If even the last of them belongs to the set, others may too.
        if count < vocabulary:
            ends = kept[:, -1].tolist()
            wide += [row for row, last in zip(rows, ends, strict=True) if last and not params[row].top_k]
    if wide:
        chosen = [params[row] for row in wide]
        tokens[wide] = _draw_wide(_take(probabilities, wide), chosen, [generators[row] for row in wide])
    return tokens


def likeliest(probabilities: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest of each row and their tokens, the largest first: twice (B, count).

    probabilities: (B, V), on a CPU. Only the blocks that hold the largest are sorted: at most `count`.
    """
    rows, vocabulary = probabilities.shape
    blocks = vocabulary // BLOCK
    if 2 * count > blocks:
        return probabilities.topk(count)
    largest = probabilities[:, : blocks * BLOCK].view(rows, blocks, BLOCK).amax(-1)
    first = largest.topk(count).indices * BLOCK
    ids = (first[..., None] + torch.arange(BLOCK)).flatten(1)
    rest = torch.arange(blocks * BLOCK, vocabulary).expand(rows, -1)
    ids = torch.cat([ids, rest], 1)
    best = probabilities.gather(1, ids).topk(count)
    return best.values, ids.gather(1, best.indices)


def _draw_wide(
    probabilities: Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator]
) -> Tensor:
    """Draw a token of each row (B,) where sets are so wide that to sort them would take long.

    Draw from all tokens (B, V), again where the token does not belong to the set (rejection sampling). A
    token belongs to it if the likelier ones have less than top_p, which takes no sorting. Of equally likely
    tokens, those with lower ids come first.
    """
    tokens = torch.empty(len(params), dtype=torch.long)
    least = torch.tensor([one.min_p for one in params]) * probabilities.amax(-1)
    top_p = torch.tensor([one.top_p for one in params], dtype=torch.float64)
    sums, ids = probabilities.cumsum(-1), torch.arange(probabilities.shape[1])
    rows = list(range(len(params)))
    for _ in range(TRIES):
        numbers = torch.cat([torch.rand(1, generator=generators[row]) for row in rows])
        drawn = _search(_take(sums, rows), numbers)
        weights = _take(probabilities, rows)
        own = weights.gather(1, drawn[:, None])
        comes_first = (weights > own) | ((weights == own) & (ids < drawn[:, None]))
        before = weights.masked_fill(~comes_first, 0).sum(-1, dtype=torch.float64)
        belongs = (before < top_p[rows]) | (top_p[rows] == 1)
        tokens[rows] = drawn
        accepted = (belongs & (own[:, 0] >= least[rows])).tolist()
        rows = [row for row, one in zip(rows, accepted, strict=True) if not one]
        if not rows:
            return tokens
    # The set holds little of the probability: sort.
    weights, ids = probabilities[rows].sort(dim=-1, descending=True, stable=True)
    numbers = torch.cat([torch.rand(1, generator=generators[row]) for row in rows])
    picked = _pick(weights * keep([params[row] for row in rows], weights), numbers)
    tokens[rows] = ids.gather(1, picked[:, None])[:, 0]
    return tokens


def _draw_sorted(probabilities: Tensor, params: Sequence[SamplingParams], numbers: Tensor) -> Tensor:
    """As `_draw`, in one call for all rows: a GPU sorts faster than it tells the host what it found.

    numbers: (B,). Of equally likely tokens, those with lower ids come first.
    """
    if not any(one.top_k or one.top_p < 1 or one.min_p > 0 for one in params):
        return _pick(probabilities, numbers)
    best = probabilities.sort(dim=-1, descending=True, stable=True)
    count = probabilities.shape[1]
    places = torch.arange(count, device=probabilities.device)
    limits = numbers_on(probabilities.device, [min(one.top_k or count, count) for one in params])
    values = best.values * (places < limits[:, None])
    picked = _pick(values * keep(params, values), numbers)
    return best.indices.gather(1, picked[:, None])[:, 0]


def _take(x: Tensor, rows: Sequence[int]) -> Tensor:
    """Return some rows, without a copy if they are all rows."""
    return x if len(rows) == len(x) else x.index_select(0, numbers_on(x.device, rows))


def _pick(weights: Tensor, numbers: Tensor) -> Tensor:
    """Return (B,) where the running sum of weights (B, n) passes a share of the whole sum.

    numbers: (B,), these shares.
    """
    return _search(weights.cumsum(-1), numbers)


def _search(sums: Tensor, numbers: Tensor) -> Tensor:
    """Return (B,) where running sums (B, n) pass a share of the last; numbers: (B,), these shares."""
    # A number is at most 1 - 2**-24, so the product is below the whole sum. Only a row with NaN passes its
    # end. Its token does not count, but a place behind the end would fail the whole batch.
    places = torch.searchsorted(sums, (numbers * sums[:, -1])[:, None], right=True)[:, 0]
    return places.clamp_(max=sums.shape[1] - 1)


def keep(params: Sequence[SamplingParams], candidates: Tensor) -> Tensor:
    """Return which candidates (B, n), the likeliest first, belong to each row's set: (B, n) bool."""
    device = candidates.device
    # Not 0, as tiny ones would be in fp32: the likeliest token always belongs to the set.
    top_p = numbers_on(device, [max(one.top_p, 1e-20) for one in params], torch.float32)[:, None]
    min_p = numbers_on(device, [one.min_p for one in params], torch.float32)[:, None]
    # With top_k, top_p counts the probability of those k tokens alone.
    of_all = numbers_on(device, [not one.top_k for one in params], torch.bool)[:, None]
    sums = candidates.cumsum(-1)
    before = (sums - candidates) / torch.where(of_all, 1.0, sums[:, -1:])
    return ((before < top_p) | (top_p == 1)) & (candidates >= min_p * candidates[:, :1])
