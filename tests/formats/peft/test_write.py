"""Adapters as PEFT's files: their names, PEFT's own logits with them, and the base that they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pumice.errors import InputError
from pumice.formats.export import export
from pumice.formats.peft.write import fingerprint
from pumice.formats.read import read_model
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import as_lazy, open_weights


@pytest.fixture(scope="module")
def model(models: ModuleType) -> LoadedParts:
    return models.tiny(models.ARCHITECTURES["CLIP + Llama, LoRA"])


@pytest.fixture(scope="module")
def folders(model: LoadedParts, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The adapter and its base."""
    adapter = tmp_path_factory.mktemp("peft") / "adapter"
    export(model, "peft", adapter)
    export(model, "hf", adapter.parent / "base", drop_lora=True)
    return adapter, adapter.parent / "base"


def test_names_and_config_are_as_peft_writes_them(folders: tuple[Path, Path]) -> None:
    adapter, _ = folders
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
    prefix = "base_model.model.model.language_model.layers."
    names = open_weights(adapter, "adapter_model")
    assert set(names) == {
        f"{prefix}{i}.{layer}.lora_{side}.weight"
        for i in range(2)
        for layer in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
        for side in "AB"
    }


def test_peft_computes_the_same(
    model: LoadedParts, models: ModuleType, formats: ModuleType, folders: tuple[Path, Path]
) -> None:
    adapter, base = folders
    shown = models.picture(120, 80)
    hf_logits, tokens = formats.transformers(base, shown, adapter)
    logits, following = formats.own_answer(model, shown)
    # measured: no difference, of logits up to 10
    assert (hf_logits[:, : logits.shape[1]] - logits).abs().max() < 1e-4
    assert tokens == following
    without, _ = formats.transformers(base, shown)
    assert (without[:, : logits.shape[1]] - logits).abs().max() > 1, "the adapter does nothing"


def test_it_is_read_back_bit_for_bit(
    model: LoadedParts, formats: ModuleType, folders: tuple[Path, Path]
) -> None:
    adapter, base = folders
    back = read_model(adapter, base=str(base))
    assert back.config.lora == model.config.lora
    assert formats.same(model, back)


def test_another_base_is_refused(models: ModuleType, folders: tuple[Path, Path], tmp_path: Path) -> None:
    other = models.tiny(models.ARCHITECTURES["CLIP + Llama, pad (LLaVA 1.5)"], seed=1)
    export(other, "hf", tmp_path / "other")
    with pytest.raises(InputError, match="fingerprint"):
        read_model(folders[0], base=str(tmp_path / "other"))


def test_a_base_is_exported_without_its_adapters(model: LoadedParts, folders: tuple[Path, Path]) -> None:
    stored = open_weights(folders[1])
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(stored[name].read(), model.state["decoder.blocks.0.attention.q.weight"].read())
    assert not any("lora" in name for name in stored)


def test_fingerprints_stay_what_they_were() -> None:
    """Adapters that were written before are still put onto their base."""
    state = {
        f"decoder.{size}": as_lazy((torch.arange(size) % 251).to(torch.bfloat16))
        for size in (1, 7, 64, 65, 1000, 2**20 + 1)
    }
    assert fingerprint(state) == "59e9c547482bfd83ef3640801e62aa9d"


@pytest.mark.parametrize("size", [2**24 + 4, 45_088_768])
def test_a_tensor_of_a_real_model_has_a_fingerprint(size: int) -> None:
    """fp32 has no number for the last place of so many, and rounds it past the end."""
    values = torch.zeros(size, dtype=torch.bfloat16)
    zeros = fingerprint({"decoder.mlp": as_lazy(values)})
    values[-1] = 1
    assert fingerprint({"decoder.mlp": as_lazy(values)}) != zeros
