"""Compiled code runs only the modules that it was written after; edited ones are computed by PyTorch."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.config import ConnectorConfig, DecoderConfig, LoraConfig, ModelConfig, VisionConfig
from pumice.engine import native
from pumice.engine.engine import Engine
from pumice.engine.generate import generate, naive_generate
from pumice.engine.native import native_decoder
from pumice.engine.requests import Delta, Prompt
from pumice.engine.sampling import SamplingParams
from pumice.model import layers
from pumice.model.adapters import add_lora
from pumice.model.cache import KVCache
from pumice.model.layers import MLP, Attention
from pumice.model.llava import Llava
from pumice.train.memory import checkpoint_blocks

PROMPT = Prompt(torch.arange(9), None, SamplingParams(max_new_tokens=8))


@pytest.fixture(autouse=True)
def compiler() -> None:
    code, reason = native.compiled("fp32")
    if code is None:
        pytest.skip(reason)


@pytest.fixture
def model() -> Llava:
    config = ModelConfig(
        DecoderConfig(52, 64, 3, 4, 2, 16, 160, context=128),
        VisionConfig(image_size=64, variant="lite0"),
        ConnectorConfig("linear"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llava = Llava(config).eval().requires_grad_(False)
        for parameter in llava.decoder.parameters():
            if parameter.dim() == 2:
                parameter.data.normal_(0, 0.3)
    return llava


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    with caplog.at_level(logging.WARNING, "pumice"):
        yield lambda: [record.getMessage() for record in caplog.records]


def ask(engine: Engine) -> list[int]:
    tokens: list[int] = []

    def deliver(delta: Delta) -> None:
        assert delta.error is None
        tokens.extend(delta.tokens)

    engine.submit(PROMPT, deliver)
    while engine.step():
        pass
    return tokens


def cap(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.clamp(max=0.5)


class Doubled(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def replace(model: Llava) -> None:
    mlp = Doubled(model.config.decoder).requires_grad_(False)
    mlp.load_state_dict(model.decoder.blocks[1].mlp.state_dict())
    model.decoder.blocks[1].mlp = mlp


def replace_from_notebook(model: Llava) -> None:
    """By a class whose module has no file, or is not known by name."""
    own = type("Own", (Doubled,), {"__module__": "notebook"})
    model.decoder.blocks[1].mlp = own(model.config.decoder).requires_grad_(False)


def hook_every_block(model: Llava) -> None:
    for block in model.decoder.blocks:
        block.mlp.register_forward_hook(cap)


def hook_before(model: Llava) -> None:
    model.decoder.blocks[0].attention.o.register_forward_pre_hook(lambda _, inputs: (-inputs[0],))


def replace_forward(model: Llava) -> None:
    mlp = model.decoder.blocks[2].mlp
    mlp.__dict__["forward"] = lambda x: mlp.up(x)[..., :64]


def replace_activation(model: Llava) -> None:
    for block in model.decoder.blocks:
        block.mlp.activation = torch.relu


def hook_decoder(model: Llava) -> None:
    model.decoder.register_forward_hook(lambda module, inputs, output: -output)


def replace_projection(model: Llava) -> None:
    """A function that `forward` calls, replaced in one module."""
    attention = model.decoder.blocks[1].attention
    attention.__dict__["project"] = lambda *inputs: [-x for x in Attention.project(attention, *inputs)]


def change_numbers(model: Llava) -> None:
    for block in model.decoder.blocks:
        block.mlp_norm.eps = 1e4


def scale_queries(model: Llava) -> None:
    model.decoder.blocks[0].attention.q_factor = 5.0


EDITS = {
    "another eps": (change_numbers, "the decoder's blocks.0.mlp_norm was edited or has hooks"),
    "another scale": (scale_queries, "the decoder's blocks.0.attention was edited or has hooks"),
    "a module of another class": (replace, "the decoder's blocks.1.mlp was edited or has hooks"),
    "a class of a notebook": (replace_from_notebook, "the decoder's blocks.1.mlp was edited or has hooks"),
    "hooks": (hook_every_block, "the decoder's blocks.0.mlp was edited or has hooks"),
    "hooks before": (hook_before, "the decoder's blocks.0.attention.o was edited or has hooks"),
    "another forward": (replace_forward, "the decoder's blocks.2.mlp was edited or has hooks"),
    "a hook of the decoder": (hook_decoder, "the decoder was edited or has hooks"),
    "another projection": (replace_projection, "the decoder's blocks.1.attention was edited or has hooks"),
    "another activation": (replace_activation, "the decoder's blocks.0.mlp was edited or has hooks"),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("when", ["before the engine", "after an answer"])
def test_edited_modules_are_computed(
    model: Llava, name: str, when: str, told: Callable[[], list[str]]
) -> None:
    edit, message = EDITS[name]
    plain = naive_generate(model, PROMPT)
    if when == "after an answer":
        engine = Engine(model)
        assert ask(engine) == plain and engine._native is not None
        edit(model)
    else:
        edit(model)
        engine = Engine(model)
    expected = naive_generate(model, PROMPT)
    assert expected != plain, "the edit changes nothing, so it would not be missed"
    assert ask(engine) == ask(engine) == expected
    assert [text.partition(",")[0] for text in told()] == [message]


def test_weights_that_are_other_tensors_are_used(model: Llava, told: Callable[[], list[str]]) -> None:
    engine = Engine(model)
    before = ask(engine)
    gate = model.decoder.blocks[0].mlp.gate
    gate.weight = nn.Parameter(-gate.weight, requires_grad=False)
    expected = naive_generate(model, PROMPT)
    assert expected != before
    assert ask(engine) == expected
    assert engine._native is not None and not told()  # compiled code, on the new tensor


@pytest.mark.parametrize("when", ["before the engine", "after an answer"])
def test_a_class_with_a_function_of_ones_own_is_noticed(
    model: Llava, when: str, monkeypatch: pytest.MonkeyPatch, told: Callable[[], list[str]]
) -> None:
    engine = Engine(model)
    if when == "after an answer":
        ask(engine)
    # A change so small that the first step through both might not show it.
    monkeypatch.setattr(MLP, "forward", lambda self, x: 1.01 * self.down(F.silu(self.gate(x)) * self.up(x)))
    engine = engine if when == "after an answer" else Engine(model)
    assert ask(engine) == naive_generate(model, PROMPT)
    assert engine._native is None
    assert [text.partition(",")[0] for text in told()] == [
        "the decoder's blocks.0.mlp was edited or has hooks"
    ]


@pytest.mark.parametrize("when", ["before the engine", "after an answer"])
def test_a_decoder_that_lost_a_block_is_computed_without_it(model: Llava, when: str) -> None:
    engine = Engine(model)
    if when == "after an answer":
        ask(engine)
    del model.decoder.blocks[-1]
    engine = engine if when == "after an answer" else Engine(model)
    assert ask(engine) == naive_generate(model, PROMPT)
    assert engine._native is None


def test_a_function_that_computes_otherwise_is_noticed(
    model: Llava, monkeypatch: pytest.MonkeyPatch, told: Callable[[], list[str]]
) -> None:
    """No module and no class shows it; the first step through both does."""
    monkeypatch.setattr(layers, "rotate", lambda x, cos, sin: -x.flip(-1))
    engine = Engine(model)
    assert ask(engine) == naive_generate(model, PROMPT)
    assert engine._native is None
    assert told() == [
        "compiled code does not give the logits of the decoder's modules, so PyTorch computes all answers, "
        "more slowly"
    ]


def test_adapters_are_no_edit_and_nothing_is_told(model: Llava, told: Callable[[], list[str]]) -> None:
    """PyTorch computes them in any case, as of a model in training, whose trainer replaces functions."""
    add_lora(model.decoder, LoraConfig(2, 4.0))
    replace_forward(model)
    engine = Engine(model)
    assert ask(engine) == naive_generate(model, PROMPT)
    assert engine._native is None and not told()


@pytest.mark.parametrize("edited", ["", "before", "after"])
def test_checkpointed_blocks_are_no_edit(model: Llava, edited: str, told: Callable[[], list[str]]) -> None:
    """But a function that wraps theirs, or that they wrap, is."""

    def negate() -> None:
        plain = model.decoder.blocks[1].forward

        @functools.wraps(plain)  # which copies what is known of the wrapped function
        def forward(*args: Any) -> Tensor:
            return -plain(*args)

        model.decoder.blocks[1].__dict__["forward"] = forward

    if edited == "before":
        negate()
    checkpoint_blocks(model.decoder.blocks, "full")
    if edited == "after":
        negate()
    engine = Engine(model)
    assert (engine._native is None) == bool(edited)
    assert ask(engine) == naive_generate(model, PROMPT)
    assert [text.partition(" was")[0] for text in told()] == (["the decoder's blocks.1"] if edited else [])


def test_hooks_that_are_gone_leave_compiled_code(model: Llava) -> None:
    handle = model.decoder.blocks[0].mlp.register_forward_hook(cap)
    engine = Engine(model)
    assert engine._native is None
    handle.remove()
    engine.forget()
    assert engine._native is not None
    assert ask(engine) == naive_generate(model, PROMPT)


@pytest.mark.parametrize("compiled", [True, False])
def test_one_edit_after_another_is_computed(
    model: Llava, compiled: bool, told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a probe does, layer by layer. The keys and values of the last edit are not used again."""
    if not compiled:
        monkeypatch.setattr("pumice.engine.engine.native_decoder", lambda *_: None)
    engine = Engine(model)
    plain = ask(engine)
    for block in model.decoder.blocks:
        handle = block.mlp.register_forward_hook(lambda _, inputs, output: -2 * output)
        expected = naive_generate(model, PROMPT)
        assert expected != plain
        assert ask(engine) == expected
        handle.remove()
    assert ask(engine) == plain
    assert (engine._native is not None) == compiled
    assert len(told()) == compiled


def test_a_hook_that_only_reads_is_called(model: Llava) -> None:
    engine = Engine(model)
    ask(engine)
    calls = []
    model.decoder.register_forward_hook(lambda *_: calls.append(1))
    tokens = ask(engine)
    assert len(calls) == len(tokens)


def test_a_decoder_that_compiled_code_does_not_implement_is_left_to_pytorch() -> None:
    config = DecoderConfig(52, 64, 2, 4, 2, 16, 160, logit_softcap=5.0)
    assert native.CAPABILITY.unsupported(config) == "compiled code does not implement logit_softcap = 5.0"
    model = Llava(ModelConfig(config, VisionConfig(image_size=64, variant="lite0"))).eval()
    cache = KVCache(config, 64, torch.device("cpu"), torch.float32)
    assert native_decoder(model.decoder, cache) is None
    tokens = [token for _, token in generate(model, [PROMPT]) if token is not None]
    assert tokens == naive_generate(model, PROMPT)
