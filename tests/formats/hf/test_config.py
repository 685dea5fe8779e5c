"""transformers' configs, old and new, read as transformers reads them; the rest refused by key."""

from __future__ import annotations

from typing import Any

import pytest

from pumice.config import RopeScaling
from pumice.errors import InputError
from pumice.formats.hf.config import decoder_config, vision_config
from pumice.storage.json_file import Keys


def decoder(**values: Any) -> Any:
    return decoder_config(Keys({"model_type": "llama"} | values, "config.json"))


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_what_is_absent_is_what_transformers_takes(family: str) -> None:
    import transformers

    hf_config = getattr(transformers, f"{family}Config")()
    absent = decoder(model_type=hf_config.model_type)
    assert decoder_config(Keys(hf_config.to_dict(), "config.json")) == absent
    assert absent.vocab_size == hf_config.vocab_size
    assert absent.kv_heads == hf_config.num_key_value_heads
    assert absent.mlp_width == hf_config.intermediate_size
    assert absent.context == hf_config.max_position_embeddings
    assert absent.head_dim == (getattr(hf_config, "head_dim", None) or 128)
    assert absent.sliding_window == (4096 if family == "Mistral" else None)


@pytest.mark.parametrize("kind", ["CLIPVision", "SiglipVision"])
def test_towers_too(kind: str) -> None:
    import transformers

    hf_config = getattr(transformers, f"{kind}Config")()
    absent = vision_config(Keys({"model_type": hf_config.model_type}, "config.json"))
    assert vision_config(Keys(hf_config.to_dict(), "config.json")) == absent
    assert (absent.width, absent.depth, absent.stride) == (768, 12, hf_config.patch_size)
    assert absent.norm_eps == hf_config.layer_norm_eps


LINEAR = RopeScaling("linear", 4.0)
LLAMA3 = RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
L3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("values", "base", "scaling"),
    [
        ({}, 1e4, None),
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, 1e4, LINEAR),
        ({"rope_scaling": {"rope_type": "llama3", **L3}, "rope_theta": 5e5}, 5e5, LLAMA3),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **L3}}, 5e5, LLAMA3),
        ({"rope_scaling": None, "rope_theta": 7}, 7.0, None),
    ],
)
def test_both_ways_to_write_rotary_positions(
    values: dict[str, Any], base: float, scaling: RopeScaling | None
) -> None:
    config = decoder(**values)
    assert (config.rope_theta, config.rope_scaling) == (base, scaling)


@pytest.mark.parametrize(
    ("values", "window"),
    [
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral", "sliding_window": 9, "max_position_embeddings": 10}, 9),
        ({"model_type": "mistral", "sliding_window": 10, "max_position_embeddings": 10}, None),  # sees all
        ({"model_type": "llama", "sliding_window": 9}, None),
        ({"model_type": "qwen2", "sliding_window": 9}, None),
        ({"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 0}, 9),
        (
            {"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 32},
            None,
        ),
        (
            {"model_type": "qwen3", "sliding_window": 9, "use_sliding_window": True,
             "layer_types": ["sliding_attention"] * 32}, 9,
        ),
    ],
)  # fmt: skip
def test_sliding_windows(values: dict[str, Any], window: int | None) -> None:
    assert decoder(**values).sliding_window == window


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "gemma"}, "model_type is 'gemma'; llama, mistral, qwen2, qwen3, gemma2 can be read"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"; only "silu" or "swish" can be read'),
        ({"attention_bias": True}, r"attention_bias is true; only false can be read \(the output proj"),
        ({"mlp_bias": True}, "mlp_bias is true; only false"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5; only 1\.0"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "rope_parameters: partial_rotary_factor is 0.5",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, 'rope_scaling: type is "dynamic"; only'),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, 'rope_scaling: rope_type is "yarn"; only'),
        ({"rope_parameters": {"rope_type": "longrope"}}, 'rope_parameters: rope_type is "longrope"; only'),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling lacks the key 'factor'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differs between layers"),
        ({"rope_theta": "1e4"}, "rope_theta should be a number, not '1e4'"),
        (
            {"logits_scaling": 8.0},
            "config.json: logits_scaling is 8.0, which Pumice does not compute; set",
        ),
        ({"residual_multiplier": 0.22}, "residual_multiplier is 0.22, which Pumice"),
        ({"clip_qkv": 8}, "clip_qkv is 8, which Pumice"),
        ({"hidden_size": 100}, "hidden_size 100 is no multiple of 32 heads"),
        ({"num_key_value_heads": 3}, "32 heads cannot share 3"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers should be a whole number, not 2.0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings should be true or false"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 30},
            "max_window_layers gives a sliding_window to 2 of 32 layers; only all, none, or all but",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "the weights are quantised by gptq"),
    ],
)
def test_what_our_decoder_is_not(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        decoder(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "dinov2"}, "model_type is 'dinov2'; clip_vision_model, clip, siglip"),
        ({"hidden_act": "relu"}, 'hidden_act is "relu"'),
        ({"num_channels": 1}, "num_channels is 1; only 3"),
        ({"patch_size": 500}, "a patch_size of 500 does not fit into an image_size of 224"),
        ({"patch_size": [14, 14]}, "patch_size should be a whole number"),
    ],
)
def test_what_our_tower_is_not(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        vision_config(Keys({"model_type": "clip"} | values, "config.json"))
