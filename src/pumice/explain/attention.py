"""A second, exact pass over prompt and answer that records where each token of the answer looked.

Knows: a Llava, ids, image tokens. Does not know: text, words, pixels. The decoder runs unchanged: its
attention is an `Attend` given from outside, and what is recorded are rows of the answer's positions times
columns of the pictures' tokens, never all of (L, H, T, T).

Token t of an answer is predicted from position t - 1; "its" row is the row of that position.

Shapes: T tokens of a passage, n tokens of the answer, L layers, H heads, K key/value heads, G = H / K,
N image tokens of all pictures, D width, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pumice.config import IMAGE_TOKEN
from pumice.model.layers import causal_mask, rotary, sdpa
from pumice.model.llava import Llava

HEADS_LIMIT = 512 * 2**20  # bytes of attention by head; beyond it only the mean over heads is kept


@dataclass(frozen=True)
class Passage:
    """A prompt with its answer, to be read once: input_ids (T,) and the pictures' tokens (N, D).

    input_ids end one token before the answer does, whose last token is predicted, not read.
    answer: the n ids that the last n positions predict.
    """

    input_ids: Tensor
    image_tokens: Tensor | None
    answer: Tensor

    @classmethod
    def of(cls, prompt: Tensor, image_tokens: Tensor | None, answer: Sequence[int]) -> Passage:
        """prompt (P,) and at least one token of an answer."""
        ids = torch.tensor(answer, dtype=torch.long)
        return cls(torch.cat((prompt.cpu(), ids[:-1])), image_tokens, ids)


@dataclass(frozen=True)
class Looks:
    """What the pass recorded, fp32 on the CPU; rows of attention sum to 1 over all that a token sees.

    attention (n, L, H, N); H is 1 where only the mean over heads was kept. rollout (n, N): attention rollout.
    gradient (n, L, N): gradient times attention, its positive part, the mean over heads; 0 where not wanted.
    """

    attention: Tensor
    rollout: Tensor | None = None
    gradient: Tensor | None = None


class Recorder:
    """Collects what the first passage's answer attends to, layer by layer."""

    def __init__(self, passage: Passage, layers: int, heads: int, *, rollout: bool, keep: bool) -> None:
        """keep: the keys and values of each layer, which `gradients` needs."""
        self.count = len(passage.answer)
        self.columns = (passage.input_ids == IMAGE_TOKEN).nonzero()[:, 0]
        small = self.count * layers * heads * len(self.columns) * 4 <= HEADS_LIMIT
        self.attention = torch.zeros(self.count, layers, heads if small else 1, len(self.columns))
        self.keep = keep
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.flow: Tensor | None = None  # (T, N): how much of each picture token has reached each position
        if rollout:
            self.flow = (torch.arange(len(passage.input_ids))[:, None] == self.columns).float()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """q (1, H, T, d), k and v (1, K, T, d) of one passage -> (1, H, T, d)."""
        if self.keep:
            self.keys.append(k[0])
            self.values.append(v[0])
        heads, shared, tokens = q.shape[1], k.shape[1], q.shape[2]
        columns, start, step = self.columns.to(k.device), tokens - self.count, shared
        outputs = []
        if self.flow is None:
            before = _causal(q[:, :, :start], k[:, :, :start], v[:, :, :start], window)
        else:  # every position's row is needed, but of few heads at a time: (T, T) is large enough
            start, step = 0, 1
            before = q[:, :, :0]
            flow = self.flow.to(k.device)
            reached = torch.zeros_like(flow)
        for first in range(0, shared, step):
            some = slice(first * heads // shared, (first + step) * heads // shared)
            rows = probabilities(q[0, some, start:], k[0, first : first + step], start, window)
            outputs.append(_mix(rows, v[0, first : first + step]))
            if self.flow is not None:
                reached += rows.sum(0) @ flow
            answer = rows[:, -self.count :, columns].transpose(0, 1).cpu()  # (n, heads, N)
            if self.attention.shape[2] == heads:
                self.attention[:, layer, some] = answer
            else:
                self.attention[:, layer, 0] += answer.sum(1) / heads
        if self.flow is not None:
            self.flow = (0.5 * reached / heads + 0.5 * flow).cpu()
        return torch.cat((before, torch.cat(outputs)[None].to(v.dtype)), 2)


class Passages:
    """Causal attention of passages that stand end to end in one row; the first is recorded."""

    def __init__(self, lengths: Sequence[int], window: int | None, recorder: Recorder | None) -> None:
        self.lengths, self.window, self.recorder = list(lengths), window, recorder

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = []
        for number, (a, b, c) in enumerate(zip(*(x.split(self.lengths, 2) for x in (q, k, v)), strict=True)):
            if number == 0 and self.recorder is not None:
                mixed.append(self.recorder.attend(layer, a, b, c, self.window))
            else:
                mixed.append(_causal(a, b, c, self.window))
        return torch.cat(mixed, 2)


def read(
    model: Llava, passages: Sequence[Passage], *, rollout: bool = False, gradient_from: int | None = None
) -> tuple[list[Tensor], Looks]:
    """Log-probabilities (n,) of each passage's answer, fp32 on the CPU, and where the first one looked.

    gradient_from: the lowest layer whose gradient is wanted, None for none. The passages run together, as one
    row of the batch, which costs little more than the longest alone.
    """
    config = model.config.decoder
    keep = gradient_from is not None
    recorder = Recorder(passages[0], config.depth, config.heads, rollout=rollout, keep=keep)
    with torch.inference_mode(False), torch.no_grad():
        stream = None if gradient_from is None else _Rows(_rows(passages[:1]))
        found = _run(model, passages, recorder, stream)
        weighted = None
        if stream is not None and gradient_from is not None:
            weighted = gradients(model, passages[0], recorder, stream, gradient_from)
    flow = None if recorder.flow is None else recorder.flow[-recorder.count :]
    return found, Looks(recorder.attention, flow, weighted)


def score(model: Llava, passages: Sequence[Passage]) -> list[Tensor]:
    """As `read`, nothing recorded."""
    with torch.inference_mode(False), torch.no_grad():
        return _run(model, passages, None, None)


def _run(
    model: Llava, passages: Sequence[Passage], recorder: Recorder | None, out: dict[str, Tensor] | None
) -> list[Tensor]:
    device = model.device
    lengths = [len(passage.input_ids) for passage in passages]
    tokens = [p.image_tokens for p in passages if p.image_tokens is not None]
    hidden = model(
        torch.cat([p.input_ids for p in passages]).to(device)[None],
        torch.cat(tokens) if tokens else None,
        torch.cat([torch.arange(length) for length in lengths]).to(device)[None],
        Passages(lengths, model.config.decoder.sliding_window, recorder),
        out,
    )
    answers = torch.cat([p.answer for p in passages]).to(device)
    found = log_probabilities(model, hidden[0, _rows(passages)], answers)
    return list(found.cpu().split([len(p.answer) for p in passages]))


def log_probabilities(model: Llava, hidden: Tensor, answer: Tensor) -> Tensor:
    """Hidden states (n, D) and the ids that they predict -> log-probabilities (n,) in fp32."""
    logits = model.decoder.logits(hidden).float()
    return logits.log_softmax(-1).gather(-1, answer[:, None])[:, 0]


def gradients(
    model: Llava, passage: Passage, recorder: Recorder, stream: dict[str, Tensor], lowest: int
) -> Tensor:
    """Gradient times attention, positive part, mean over heads (arXiv 2103.15679, equation 5): (n, L, N).

    The gradient is that of each token's log-probability to the row of its own position. That row acts on its
    own word through its own position's residual stream alone; held apart from what positions tell each other
    (their keys and values), one pass backwards serves all words at once, and exactly. Blocks are run again
    one by one, from the last to the lowest, so that no more than one block's activations are kept.
    """
    config = model.config.decoder
    count, length = len(passage.answer), len(passage.input_ids)
    place = torch.arange(length - count, length, device=model.device)[None]
    cos, sin = rotary(place, config)
    weighted = torch.zeros(count, config.depth, len(recorder.columns))
    columns = recorder.columns.to(model.device)
    with torch.enable_grad():
        x = stream[f"decoder.blocks.{config.depth - 1}"].requires_grad_()
        said = log_probabilities(model, model.decoder.norm(x)[0], passage.answer.to(model.device)).sum()
        (above,) = torch.autograd.grad(said, x)
        for layer in range(config.depth - 1, lowest - 1, -1):
            below = stream["embeddings" if layer == 0 else f"decoder.blocks.{layer - 1}"].requires_grad_()
            attend = _Own(recorder.keys[layer], recorder.values[layer], config.sliding_window)
            made = model.decoder.blocks[layer](below, cos, sin, attend)
            # of a sum: given a gradient to begin with, PyTorch imports a second's worth of symbolic algebra
            above, slope = torch.autograd.grad((made * above).sum(), (below, attend.rows))
            both = (slope * attend.rows.detach())[:, :, columns].clamp_min(0)
            weighted[:, layer] = both.mean(0).cpu()
    return weighted


class _Own:
    """The answer's positions meet keys and values as they were; each its own as it is, with its gradient."""

    def __init__(self, keys: Tensor, values: Tensor, window: int | None) -> None:
        self.keys, self.values, self.window = keys, values, window
        self.rows = keys

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads, count = q.shape[1:3]
        start = self.keys.shape[1] - count
        groups = heads // k.shape[1]
        place = torch.arange(count, device=q.device)
        own_k, own_v = (x[0].float().repeat_interleave(groups, 0) for x in (k, v))  # (H, n, d)
        scores = _scores(q[0], self.keys)  # (H, n, T)
        scores = scores.index_put(
            (torch.arange(heads, device=q.device)[:, None], place, start + place),
            (q[0].float() * own_k).sum(-1) / math.sqrt(q.shape[-1]),
        )
        self.rows = _softmax(scores, start, self.window)
        own = self.rows[:, place, start + place][..., None]
        return (_mix(self.rows, self.values) + own * (own_v - own_v.detach()))[None].to(v.dtype)


class _Rows(dict[str, Tensor]):
    """Keeps of each named intermediate (1, T, D) only some rows: (1, n, D)."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows

    def __setitem__(self, name: str, value: Tensor) -> None:
        super().__setitem__(name, value[:, self.rows])


def _rows(passages: Sequence[Passage]) -> Tensor:
    """Where the answers' positions stand when the passages stand end to end."""
    rows, end = [], 0
    for passage in passages:
        end += len(passage.input_ids)
        rows.append(torch.arange(end - len(passage.answer), end))
    return torch.cat(rows)


def probabilities(q: Tensor, k: Tensor, start: int, window: int | None) -> Tensor:
    """q (H, n, d) of positions from `start` on and k (K, T, d) -> attention (H, n, T) in fp32."""
    return _softmax(_scores(q, k), start, window)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    grouped = q.float().unflatten(0, (k.shape[0], -1))  # (K, G, n, d)
    return (grouped @ k.float()[:, None].transpose(-1, -2)).flatten(0, 1) / math.sqrt(q.shape[-1])


def _softmax(scores: Tensor, start: int, window: int | None) -> Tensor:
    order = torch.arange(scores.shape[-1], device=scores.device)
    mask = causal_mask(order[start : start + scores.shape[-2]], order, window)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1)


def _mix(rows: Tensor, values: Tensor) -> Tensor:
    """Attention (H, n, T) and values (K, T, d) -> (H, n, d) in fp32."""
    return (rows.unflatten(0, (values.shape[0], -1)) @ values.float()[:, None]).flatten(0, 1)


def _causal(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    tokens = q.shape[2]
    if window is None or tokens <= window:
        return sdpa(q, k, v, causal=True)
    order = torch.arange(tokens, device=q.device)
    return sdpa(q, k, v, causal_mask(order, order, window))
