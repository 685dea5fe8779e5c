"""What shapes do not say of a family, such as how it rotates, stands in its row and is checked."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pumice.config import DecoderConfig
from pumice.errors import InputError
from pumice.formats.families import FAMILIES, HALVES, INTERLEAVED, ROTATE_NEIGHBOURS, Family
from pumice.formats.gguf.llm import open_gguf
from pumice.formats.gguf.write import _permuted
from pumice.formats.hf.config import decoder_config
from pumice.model.layers import rotary, rotate
from pumice.storage.json_file import Keys
from pumice.storage.tensors import as_lazy

# What `rotate_half` of transformers makes of the numbers 0 to 7, by the pairs that rotate together.
HALF_TURNED = {
    HALVES: [-4, -5, -6, -7, 0, 1, 2, 3],
    INTERLEAVED: [-1, 0, -3, 2, -5, 4, -7, 6],
}


def half_turned(kind: str) -> list[float]:
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    turn = getattr(module, "rotate_half", None) or module.rotate_every_two
    return turn(torch.arange(8.0)[None, None, None])[0, 0, 0].tolist()


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_row_states_the_rotation_of_transformers(kind: str) -> None:
    assert half_turned(kind) == HALF_TURNED[FAMILIES[kind].rotation]


@pytest.mark.parametrize("kind", sorted(ROTATE_NEIGHBOURS))
def test_families_that_rotate_neighbours_do_so_in_transformers(kind: str) -> None:
    assert half_turned(kind) == HALF_TURNED[INTERLEAVED]


def test_a_row_must_state_what_no_tensor_tells() -> None:
    with pytest.raises(TypeError, match="rotation"):
        Family({}, "HeliumForCausalLM", None, None, window="never", gguf=None)
    for name in ("rotation", "window", "gguf"):
        with pytest.raises(InputError, match=rf"LlamaForCausalLM: {name} is 'other'; use one of '"):
            replace(FAMILIES["llama"], **{name: "other"})


@pytest.mark.parametrize("name", ["Helium", "Ernie4_5"])
def test_a_family_with_a_llamas_tensors_that_rotates_neighbours_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All else of the row and the checkpoint fits: every key can be read, and every tensor has its place."""
    import transformers

    sizes = {
        "vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40,
    }  # fmt: skip
    values = getattr(transformers, f"{name}Config")(**sizes).to_dict()
    kind = values["model_type"]
    with pytest.raises(InputError, match=f"model_type is '{kind}'; llama"):
        decoder_config(Keys(values, "config.json"))
    row = replace(FAMILIES["llama"], class_name=f"{name}ForCausalLM")
    for rotation in (HALVES, INTERLEAVED):
        monkeypatch.setitem(FAMILIES, kind, replace(row, rotation=rotation))
        with pytest.raises(InputError, match=f"rotary positions of {kind} turn neighbouring values"):
            decoder_config(Keys(values, "config.json"))
    # With another name, which nobody has listed, what the row states decides.
    values["model_type"] = "newest"
    monkeypatch.setitem(FAMILIES, "newest", row)
    decoder_config(Keys(values, "config.json"))
    monkeypatch.setitem(FAMILIES, "newest", replace(row, rotation=INTERLEAVED))
    with pytest.raises(InputError, match="rotary positions of newest turn neighbouring values"):
        decoder_config(Keys(values, "config.json"))


SMALL: dict[str, Any] = {
    "model_type": "newest", "num_hidden_layers": 6, "sliding_window": 8, "hidden_act": "silu",
}  # fmt: skip


@pytest.mark.parametrize(
    ("window", "keys", "expected"),
    [
        ("never", {}, (None, 1)),
        ("all", {}, (8, 1)),
        ("layer_types", {}, (8, 1)),
        ("layer_types", {"layer_types": ["sliding_attention", "full_attention"] * 3}, (8, 2)),
        ("layer_types", {"layer_types": ["full_attention"] * 6}, (None, 1)),
        ("use_sliding_window", {}, (None, 1)),
        ("use_sliding_window", {"use_sliding_window": True}, (8, 1)),
    ],
)
def test_a_row_states_which_layers_have_the_window(
    window: str, keys: dict[str, Any], expected: tuple[int | None, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "newest", replace(FAMILIES["llama"], window=window))
    config = decoder_config(Keys(SMALL | keys, "config.json"))
    assert (config.sliding_window, config.window_pattern) == expected


def test_a_default_of_rope_theta_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = FAMILIES["llama"]
    monkeypatch.setitem(
        FAMILIES, "newest", replace(llama, defaults=llama.defaults | {"rope_theta": 100000.0})
    )
    assert decoder_config(Keys(SMALL, "config.json")).rope_theta == 100000.0
    assert decoder_config(Keys(SMALL | {"rope_theta": 500.0}, "config.json")).rope_theta == 500.0


def turn_neighbours(x: Tensor, config: DecoderConfig) -> Tensor:
    """GPT-J's rotation of x (heads, T, d) as complex numbers: value 2 i with value 2 i + 1."""
    powers = torch.arange(0, config.head_dim, 2) / config.head_dim
    angles = torch.arange(x.shape[1])[:, None] / config.rope_theta**powers
    pairs = torch.view_as_complex(x.reshape(*x.shape[:2], -1, 2).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def test_reordered_for_gguf_neighbours_rotate_as_halves_did() -> None:
    """llama.cpp rotates neighbours in a llama (LLAMA_ROPE_TYPE_NORM): scores must stay the same."""
    config = DecoderConfig(67, 32, 1, 4, 2, 12, 40)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 32, generator=generator)
    cos, sin = rotary(torch.arange(9)[None], config)
    ours, reordered = [], []
    for heads in (4, 2):  # queries, keys
        weight = torch.randn(heads * 12, 32, generator=generator)
        ours.append(rotate((x @ weight.T).view(9, heads, 12).transpose(0, 1)[None], cos, sin)[0])
        stored = _permuted(as_lazy(weight), heads).read()
        reordered.append(turn_neighbours((x @ stored.T).view(9, heads, 12).transpose(0, 1), config))
    scores = [q @ k.repeat_interleave(2, 0).transpose(1, 2) for q, k in (ours, reordered)]
    torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)  # measured: 2e-5
    untouched = turn_neighbours(ours[0], config)
    assert not torch.allclose(untouched, reordered[0], atol=1e-2)


def test_the_rows_rotation_decides_the_order_in_gguf(
    write_gguf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A llama's matrices are reordered as they are read, and another architecture's as its row says."""
    exact = write_gguf(tmp_path / "llama.gguf")
    stored = write_gguf(tmp_path / "other.gguf", kind="newest")
    name = "blocks.0.attention.q.weight"
    assert torch.equal(open_gguf(tmp_path / "llama.gguf").state[name].read(), exact[name])
    for gguf, same in ((HALVES, True), (INTERLEAVED, False)):
        monkeypatch.setitem(FAMILIES, "newest", replace(FAMILIES["llama"], gguf=gguf))
        read = open_gguf(tmp_path / "other.gguf").state[name].read()
        assert torch.equal(read, stored[name]) is same
    monkeypatch.setitem(FAMILIES, "newest", replace(FAMILIES["llama"], gguf=None))
    with pytest.raises(InputError, match="the architecture 'newest'; llama, qwen2, qwen3 can be read"):
        open_gguf(tmp_path / "other.gguf")
