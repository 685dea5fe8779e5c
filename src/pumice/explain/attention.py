"""Run the decoder again over prompt and answer, and record how each answer token attends to the images.

The decoder runs unchanged: it gets an `Attend` that also records. Only the rows of the answer and the columns
of the image tokens are recorded, never all of (L, H, T, T).

Token t of an answer is predicted at position t - 1; "its" row of attention is the row of that position.

Shapes: T tokens of a passage, n tokens of the answer, L layers, H heads, K key/value heads, G = H / K,
N image tokens of all images, D width, d head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pumice.capability import GEMMA2, LLAMA, ROPE_SCALING, Capability, fields
from pumice.config import IMAGE_TOKEN, DecoderConfig, RopeScaling
from pumice.model.finite import check_finite
from pumice.model.layers import Causal, causal_mask, rotary, soft_cap
from pumice.model.llava import Llava
from pumice.stopping import check_stopped

LOGIT_ROWS = 128  # whose logits, of the complete vocabulary, are computed at a time
HEADS_LIMIT = 512 * 2**20  # bytes; if attention by head takes more, only the mean over heads is recorded
CAPABILITY = Capability(
    "the attention of explanations",
    {DecoderConfig: fields(f"{LLAMA} {GEMMA2}"), RopeScaling: fields(ROPE_SCALING)},
)


@dataclass(frozen=True)
class Passage:
    """A prompt with its answer, to run once: input_ids (T,) and image tokens (N, D).

    answer: the n ids that the last n positions predict. Its last id is only predicted, so it is not in
    input_ids.
    """

    input_ids: Tensor
    image_tokens: Tensor | None
    answer: Tensor

    @classmethod
    def of(cls, prompt: Tensor, image_tokens: Tensor | None, answer: Sequence[int]) -> Passage:
        """Build a passage from a prompt (P,) and at least one token of an answer."""
        ids = torch.tensor(answer, dtype=torch.long)
        return cls(torch.cat((prompt.cpu(), ids[:-1])), image_tokens, ids)


@dataclass(frozen=True)
class AttentionRecord:
    """What one pass recorded, fp32 on the CPU. A row of attention sums to 1 over all tokens, images and text.

    attention (n, L, H, N); H is 1 if only the mean over heads was recorded. rollout (n, N): attention
    rollout. gradient (n, L, N): positive part of gradient times attention, mean over heads; 0 for layers not
    asked for.
    """

    attention: Tensor
    rollout: Tensor | None = None
    gradient: Tensor | None = None


class Recorder:
    """Records what the answer of one passage attends to, layer by layer."""

    def __init__(self, passage: Passage, layers: int, heads: int, *, rollout: bool, keep_kv: bool) -> None:
        """keep_kv: keep the keys and values of each layer, which `gradients` needs."""
        self.count = len(passage.answer)
        self.columns = (passage.input_ids == IMAGE_TOKEN).nonzero()[:, 0]
        by_head = self.count * layers * heads * len(self.columns) * 4 <= HEADS_LIMIT
        self.attention = torch.zeros(self.count, layers, heads if by_head else 1, len(self.columns))
        self.keep_kv = keep_kv
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.flow: Tensor | None = None  # (T, N): share of each image token that has reached each position
        if rollout:
            self.flow = (torch.arange(len(passage.input_ids))[:, None] == self.columns).float()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, causal: Causal) -> Tensor:
        """Attend and record: q (1, H, T, d), k and v (1, K, T, d) of one passage -> (1, H, T, d)."""
        config = causal.config
        if self.keep_kv:
            self.keys.append(k[0])
            self.values.append(v[0])
        heads, kv_heads, tokens = q.shape[1], k.shape[1], q.shape[2]
        columns, start, step = self.columns.to(k.device), tokens - self.count, kv_heads
        outputs = []
        # 1. Rows before the answer are not recorded: compute them with the fast kernel.
        if self.flow is None:
            prompt_output = causal(layer, q[:, :, :start], k[:, :, :start], v[:, :, :start])
        else:  # rollout needs all rows; take one key/value head at a time, because (T, T) is large
            start, step = 0, 1
            prompt_output = q[:, :, :0]
            flow = self.flow.to(k.device)
            reached = torch.zeros_like(flow)
        # 2. Compute the recorded rows explicitly, some heads at a time.
        for first in range(0, kv_heads, step):
            head_range = slice(first * heads // kv_heads, (first + step) * heads // kv_heads)
            scores = _scores(q[0, head_range, start:], k[0, first : first + step])
            rows = _softmax(scores, start, config, layer)
            outputs.append(_mix(rows, v[0, first : first + step]))
            if self.flow is not None:
                reached += rows.sum(0) @ flow
            answer = rows[:, -self.count :, columns].transpose(0, 1).cpu()  # (n, heads, N)
            if self.attention.shape[2] == heads:
                self.attention[:, layer, head_range] = answer
            else:
                self.attention[:, layer, 0] += answer.sum(1) / heads
        # 3. Rollout (arXiv 2005.00928): half of each position is attention, half the residual stream.
        if self.flow is not None:
            self.flow = (0.5 * reached / heads + 0.5 * flow).cpu()
        return torch.cat((prompt_output, torch.cat(outputs)[None].to(v.dtype)), 2)


class Passages:
    """Causal attention of passages laid end to end in one row; the first one is recorded."""

    def __init__(self, lengths: Sequence[int], config: DecoderConfig, recorder: Recorder | None) -> None:
        CAPABILITY.check(config)
        self.lengths, self.causal, self.recorder = list(lengths), Causal(config), recorder

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        check_stopped()
        mixed = []
        parts = zip(*(x.split(self.lengths, 2) for x in (q, k, v)), strict=True)
        for number, (own_q, own_k, own_v) in enumerate(parts):
            if number == 0 and self.recorder is not None:
                mixed.append(self.recorder.attend(layer, own_q, own_k, own_v, self.causal))
            else:
                mixed.append(self.causal(layer, own_q, own_k, own_v))
        return torch.cat(mixed, 2)


def read(
    model: Llava, passages: Sequence[Passage], *, rollout: bool = False, gradient_from: int | None = None
) -> tuple[list[Tensor], AttentionRecord]:
    """Return the log-probabilities (n,) of each passage's answer, and the attention of the first passage.

    All are fp32 on the CPU. rollout: also compute attention rollout. gradient_from: the lowest layer whose
    gradient is computed; None computes none. The passages run together, as one row of the batch, which costs
    little more than the longest one alone.
    """
    config = model.config.decoder
    keep_kv = gradient_from is not None
    recorder = Recorder(passages[0], config.depth, config.heads, rollout=rollout, keep_kv=keep_kv)
    with torch.inference_mode(False), torch.no_grad():
        stream = None if gradient_from is None else _Rows(_rows(passages[:1]))
        logprobs = _run(model, passages, recorder, stream)
        gradient = None
        if stream is not None and gradient_from is not None:
            gradient = gradients(model, passages[0], recorder, stream, gradient_from)
    flow = None if recorder.flow is None else recorder.flow[-recorder.count :]
    return logprobs, AttentionRecord(recorder.attention, flow, gradient)


def score(model: Llava, passages: Sequence[Passage]) -> list[Tensor]:
    """Return log-probabilities as `read`, without recording attention."""
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
        Passages(lengths, model.config.decoder, recorder),
        out,
    )
    answers = torch.cat([p.answer for p in passages]).to(device).split(LOGIT_ROWS)
    rows = hidden[0, _rows(passages)].split(LOGIT_ROWS)
    logprobs = torch.cat([log_probabilities(model, *part) for part in zip(rows, answers, strict=True)])
    return list(logprobs.cpu().split([len(p.answer) for p in passages]))


def log_probabilities(model: Llava, hidden: Tensor, answer: Tensor) -> Tensor:
    """Return the log-probabilities (n,) in fp32 of the ids (n,) that the hidden states (n, D) predict.

    Raises WorkError if they are not finite.
    """
    logits = model.decoder.logits(hidden).float()
    check_finite(model, logits)
    return logits.log_softmax(-1).gather(-1, answer[:, None])[:, 0]


def gradients(
    model: Llava, passage: Passage, recorder: Recorder, stream: dict[str, Tensor], lowest: int
) -> Tensor:
    """Return gradient times attention, positive part, mean over heads (arXiv 2103.15679, equation 5): (n, L,
    N).

    The gradient is that of each token's log-probability with respect to its own row of attention. A row acts
    on its own token only through the residual stream of its own position. If the keys and values of other
    positions are held constant, one backward pass gives the exact gradients of all tokens at once. Blocks run
    again one by one, from the last to the lowest, so that only one block's activations are in memory.
    """
    config = model.config.decoder
    count, length = len(passage.answer), len(passage.input_ids)
    positions = torch.arange(length - count, length, device=model.device)[None]
    cos, sin = rotary(positions, config)
    weighted = torch.zeros(count, config.depth, len(recorder.columns))
    columns = recorder.columns.to(model.device)
    with torch.enable_grad():
        x = stream[f"decoder.blocks.{config.depth - 1}"].requires_grad_()
        # 1. The gradient of all log-probabilities with respect to the last block's output.
        logprob_sum = log_probabilities(
            model, model.decoder.norm(x)[0], passage.answer.to(model.device)
        ).sum()
        (above,) = torch.autograd.grad(logprob_sum, x)
        # 2. Carry it back block by block, and take each block's gradient of attention on the way.
        for layer in range(config.depth - 1, lowest - 1, -1):
            check_stopped()
            below = stream["embeddings" if layer == 0 else f"decoder.blocks.{layer - 1}"].requires_grad_()
            attend = _OwnPosition(recorder.keys[layer], recorder.values[layer], config)
            output = model.decoder.blocks[layer](below, cos, sin, attend)
            # As the gradient of a sum: with `grad_outputs`, PyTorch imports its symbolic algebra, which takes
            # a second.
            above, slope = torch.autograd.grad((output * above).sum(), (below, attend.rows))
            product = (slope * attend.rows.detach())[:, :, columns].clamp_min(0)
            weighted[:, layer] = product.mean(0).cpu()
    return weighted


class _OwnPosition:
    """Attention of the answer to recorded keys and values; only each position's own ones carry gradients."""

    def __init__(self, keys: Tensor, values: Tensor, config: DecoderConfig) -> None:
        self.keys, self.values, self.config = keys, values, config
        self.rows = keys

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads, count = q.shape[1:3]
        start = self.keys.shape[1] - count
        groups = heads // k.shape[1]
        index = torch.arange(count, device=q.device)
        own_k, own_v = (x[0].float().repeat_interleave(groups, 0) for x in (k, v))  # (H, n, d)
        scores = _scores(q[0], self.keys)  # (H, n, T)
        scores = scores.index_put(
            (torch.arange(heads, device=q.device)[:, None], index, start + index),
            (q[0].float() * own_k).sum(-1) / math.sqrt(q.shape[-1]),
        )
        self.rows = _softmax(scores, start, self.config, layer)
        own = self.rows[:, index, start + index][..., None]
        return (_mix(self.rows, self.values) + own * (own_v - own_v.detach()))[None].to(v.dtype)


class _Rows(dict[str, Tensor]):
    """A dictionary of intermediates (1, T, D) that stores only some of their rows: (1, n, D)."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows

    def __setitem__(self, name: str, value: Tensor) -> None:
        super().__setitem__(name, value[:, self.rows])


def _rows(passages: Sequence[Passage]) -> Tensor:
    """Return the positions of all answers when the passages are laid end to end."""
    rows, end = [], 0
    for passage in passages:
        end += len(passage.input_ids)
        rows.append(torch.arange(end - len(passage.answer), end))
    return torch.cat(rows)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    grouped = q.float().unflatten(0, (k.shape[0], -1))  # (K, G, n, d)
    return (grouped @ k.float()[:, None].transpose(-1, -2)).flatten(0, 1) / math.sqrt(q.shape[-1])


def _softmax(scores: Tensor, start: int, config: DecoderConfig, layer: int) -> Tensor:
    """Return a layer's attention (H, n, T) from scores of the tokens from position `start` on."""
    order = torch.arange(scores.shape[-1], device=scores.device)
    mask = causal_mask(order[start : start + scores.shape[-2]], order, config.window(layer))
    scores = soft_cap(scores, config.attention_softcap)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1)


def _mix(rows: Tensor, values: Tensor) -> Tensor:
    """Average values (K, T, d) with attention (H, n, T): (H, n, d) in fp32."""
    return (rows.unflatten(0, (values.shape[0], -1)) @ values.float()[:, None]).flatten(0, 1)
