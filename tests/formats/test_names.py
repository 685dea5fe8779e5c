"""Tables of names: exact in both directions, and errors that name the key."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pumice.config import DecoderConfig
from pumice.errors import InputError, some
from pumice.formats import names as tensor_names
from pumice.storage.tensors import as_lazy

CONFIG = DecoderConfig(
    vocab_size=32, width=16, depth=2, heads=2, kv_heads=1, head_dim=8, mlp_width=24, tied_head=True
)
FAMILIES = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"tied_head": False},
    "Qwen2ForCausalLM": {"qkv_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": True, "tied_head": False},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_names_map_one_to_one(family: str) -> None:
    import transformers

    config = dataclasses.replace(CONFIG, **FAMILIES[family])
    model_class = getattr(transformers, family)
    model = model_class(
        model_class.config_class(
            vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, intermediate_size=24, tie_word_embeddings=config.tied_head,
        )
    )  # fmt: skip
    state = {name: as_lazy(tensor) for name, tensor in model.state_dict().items()}
    table = tensor_names.hf_decoder(config)
    converted = tensor_names.convert(state, table)
    assert converted.keys() == {table[name] for name in state}
    assert converted["blocks.1.mlp.down.weight"].shape == (16, 24)
    back = tensor_names.convert(converted, tensor_names.inverse(table))
    copies = {"lm_head.weight"} if config.tied_head else set()
    assert back.keys() == state.keys() - copies
    assert all(back[name] is state[name] for name in back)


def test_both_families_of_names_have_the_same_targets() -> None:
    config = dataclasses.replace(CONFIG, qkv_bias=True, qk_norm=True, tied_head=False)
    hf, gguf = tensor_names.hf_decoder(config), tensor_names.gguf_decoder(config)
    assert tensor_names.inverse(hf).keys() == tensor_names.inverse(gguf).keys()


def test_unknown_missing_and_dropped() -> None:
    table = tensor_names.expand({"a.{i}.w": "b.{i}", "old.{i}": None, "c": "d"}, 2)
    first, second, third, other = (as_lazy(torch.rand(2)) for _ in range(4))
    full = {"a.0.w": first, "a.1.w": second, "c": third}
    assert tensor_names.convert(full, table) == {"b.0": first, "b.1": second, "d": third}
    assert tensor_names.convert({**full, "old.1": other}, table).keys() == {"b.0", "b.1", "d"}
    with pytest.raises(InputError, match=r"^m\.bin does not .* unknown a\.2\.w, x$"):
        tensor_names.convert({**full, "a.2.w": other, "x": other}, table, "m.bin")
    with pytest.raises(InputError, match=r"missing a\.1\.w$"):
        tensor_names.convert({"a.0.w": first, "c": third}, table)
    with pytest.raises(InputError, match=r"unknown old\.2; missing c$"):
        tensor_names.convert({"a.0.w": first, "a.1.w": second, "old.2": other}, table)


def test_long_lists_are_counted() -> None:
    assert some(list("abcdefg")) == "a, b, c, d, e and 2 more"
