"""The second pass: the fast path's numbers, and rows of attention that plain definitions give, too."""

from __future__ import annotations

import dataclasses
import threading
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from pumice.assistant import Assistant
from pumice.config import IMAGE_TOKEN
from pumice.conversation import Conversation, user_message
from pumice.engine.generate import generate
from pumice.explain import attention
from pumice.explain.attention import Passage, log_probabilities, read, score
from pumice.model.quantized import quantize
from pumice.stopping import Stopped, stoppable

NAMES = (
    "CLIP + Llama, pad (LLaVA 1.5)",
    "CLIP + Mistral, anyres (LLaVA 1.6)",
    "SigLIP + Qwen2, squash",
    "CLIP + Qwen3, crop",
    "EfficientNet + SmolLM2 (pumice-tiny)",
)


def opened(models: ModuleType, name: str, window: int | None = None) -> Assistant:
    architecture = models.ARCHITECTURES[name]
    if window is not None:
        decoder = dataclasses.replace(architecture.config.decoder, sliding_window=window)
        changed = dataclasses.replace(architecture.config, decoder=decoder)
        architecture = dataclasses.replace(architecture, config=changed)
    assistant: Assistant = models.assistant(models.tiny(architecture))
    return assistant


def passage_of(assistant: Assistant, models: ModuleType, tokens: int = 7) -> Passage:
    conversation = Conversation((user_message("What is it?", [models.picture(70, 50)]),))
    prompt = assistant.prompt(conversation, max_new_tokens=tokens)
    ids = [token for _, token in generate(assistant.model, [prompt]) if token is not None]
    assert ids
    return Passage.of(prompt.input_ids, prompt.encode_images(), ids)


class ExplicitAttention:
    """Attention in plain products; all rows are recorded and differentiable."""

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.rows: list[Tensor] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        order = torch.arange(q.shape[2])
        distance = order[:, None] - order
        hidden = (distance < 0) | (distance >= (self.window or 10**9))
        rows = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        self.rows.append(rows.requires_grad_() if not rows.requires_grad else rows)
        return rows @ v


def explicit_attention(assistant: Assistant, passage: Passage) -> tuple[Tensor, list[Tensor], Tensor]:
    """Log-probabilities (n,), rows of every layer (1, H, T, T), columns of the picture."""
    attend = ExplicitAttention(assistant.model.config.decoder.sliding_window)
    assert passage.image_tokens is not None
    hidden = assistant.model(passage.input_ids[None], passage.image_tokens.clone(), attend=attend)
    actual = log_probabilities(assistant.model, hidden[0, -len(passage.answer) :], passage.answer)
    return actual, attend.rows, (passage.input_ids == IMAGE_TOKEN).nonzero()[:, 0]


@pytest.mark.parametrize("name", NAMES)
def test_the_fast_path_s_numbers(models: ModuleType, name: str) -> None:
    assistant = opened(models, name)
    passage = passage_of(assistant, models)
    text = Passage.of(torch.arange(5, 30), None, [7, 8, 9])
    with torch.inference_mode():
        hidden = assistant.model(passage.input_ids[None], passage.image_tokens)
        fast = log_probabilities(assistant.model, hidden[0, -len(passage.answer) :], passage.answer)
    # logits are of the order of 50 here
    for options in ({}, {"rollout": True}, {"gradient_from": 0}):
        actual, _ = read(assistant.model, [passage, text, passage], **options)
        assert torch.allclose(actual[0], fast, atol=2e-4)
        assert torch.allclose(actual[2], fast, atol=2e-4)
        assert torch.allclose(actual[1], score(assistant.model, [text])[0], atol=2e-4)


@pytest.mark.parametrize(("name", "window"), [*((name, None) for name in NAMES), (NAMES[0], 20)])
def test_rows_are_those_of_attention_written_out(models: ModuleType, name: str, window: int | None) -> None:
    assistant = opened(models, name, window)
    passage = passage_of(assistant, models)
    _, rows, columns = explicit_attention(assistant, passage)
    count = len(passage.answer)
    expected = torch.stack([r[0, :, -count:][..., columns] for r in rows]).permute(2, 0, 1, 3)  # (n, L, H, N)
    flow = torch.eye(len(passage.input_ids))
    for layer in rows:
        flow = 0.5 * layer[0].mean(0) @ flow + 0.5 * flow
    for rollout in (False, True):
        _, record = read(assistant.model, [passage], rollout=rollout)
        assert record.attention.shape == (count, len(rows), rows[0].shape[1], len(columns))
        assert torch.allclose(record.attention, expected, atol=1e-5)
    assert record.rollout is not None
    assert torch.allclose(record.rollout, flow[-count:][:, columns], atol=1e-5)


@pytest.mark.parametrize(("name", "window"), [*((name, None) for name in NAMES), (NAMES[0], 20)])
def test_gradients_of_all_words_at_once_are_those_of_each_alone(
    models: ModuleType, name: str, window: int | None
) -> None:
    assistant = opened(models, name, window)
    passage = passage_of(assistant, models)
    _, record = read(assistant.model, [passage], gradient_from=0)
    assert record.gradient is not None
    with torch.inference_mode(False), torch.enable_grad():
        actual, rows, columns = explicit_attention(assistant, passage)
        count = len(passage.answer)
        for number in range(count):
            slopes = torch.autograd.grad(actual[number], rows, retain_graph=True)
            own = number - count
            for layer, (slope, row) in enumerate(zip(slopes, rows, strict=True)):
                both = (slope * row).detach()[0, :, own, columns].clamp_min(0).mean(0)
                scale = max(1.0, float(both.max()))
                assert torch.allclose(record.gradient[number, layer] / scale, both / scale, atol=1e-4)


def test_gradients_that_are_stopped_end_after_a_block(
    models: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assistant = opened(models, NAMES[0])
    passage = passage_of(assistant, models)
    stop, begun, begin = threading.Event(), [], attention._OwnPosition.__init__

    def noted(attend: Any, *arguments: Any) -> None:
        begun.append(attend)
        stop.set()
        begin(attend, *arguments)

    monkeypatch.setattr(attention._OwnPosition, "__init__", noted)
    with stoppable(stop), pytest.raises(Stopped):
        read(assistant.model, [passage], gradient_from=0)
    assert len(begun) == 1 < assistant.model.config.decoder.depth


def test_gradients_through_int8(models: ModuleType) -> None:
    assistant = opened(models, NAMES[4])
    passage = passage_of(assistant, models)
    quantize(assistant.model.decoder, "int8")
    assistant.model.decoder.bfloat16()
    _, record = read(assistant.model, [passage], gradient_from=0)
    assert record.gradient is not None
    assert record.gradient.isfinite().all()
    assert record.gradient.sum() > 0


def test_heads_are_left_out_where_they_take_too_much_room(
    models: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assistant = opened(models, NAMES[0])
    passage = passage_of(assistant, models)
    _, by_head = read(assistant.model, [passage])
    monkeypatch.setattr("pumice.explain.attention.HEADS_LIMIT", 0)
    for rollout in (False, True):
        _, mean = read(assistant.model, [passage], rollout=rollout)
        assert mean.attention.shape[2] == 1
        assert torch.allclose(mean.attention, by_head.attention.mean(2, keepdim=True), atol=1e-6)
