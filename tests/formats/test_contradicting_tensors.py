"""Tensors that stand twice, or that the config decides: copies that differ are refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pumice.config import RopeScaling
from pumice.errors import InputError
from pumice.formats import names as tensor_names
from pumice.formats.components import open_llm, open_tower
from pumice.formats.gguf.file import GgufFile
from pumice.formats.hf.read import open_hf
from pumice.formats.llava.read import open_original
from pumice.formats.peft.read import adapt
from pumice.formats.pumice.folder import open_parts
from pumice.formats.read import read_model
from pumice.model.layers import rope_inv_freq
from pumice.storage.tensors import open_weights

Llavas = Callable[[str], Path]
Change = Callable[..., None]
HEAD, EMBED = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


def with_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


# Tensors that stand twice


def test_a_stored_head_beside_a_tied_one_must_be_its_copy(hf: Callable[[str], Path]) -> None:
    folder = hf("siglip")  # tied
    with_tensors(folder, lambda tensors: tensors.update({HEAD: tensors[EMBED].clone()}))
    state = open_hf(folder).state
    assert "decoder.head.weight" not in state
    with_tensors(folder, lambda tensors: tensors.update({HEAD: tensors[EMBED] * 1.01}))
    with pytest.raises(InputError, match=rf"{HEAD} in .*{EMBED} in .*|{EMBED} in .*{HEAD} in .*differ"):
        open_hf(folder)


def test_a_tied_head_may_stand_under_either_name(hf: Callable[[str], Path]) -> None:
    folder = hf("siglip")
    expected = open_hf(folder).state["decoder.embed.weight"].read()
    table = tensor_names.hf_decoder(open_hf(folder).config.decoder)
    tensors = {
        name: open_hf(folder).state[f"decoder.{ours}"]
        for name, ours in table.items()
        if isinstance(ours, str)
    }
    del tensors["model.embed_tokens.weight"]
    assert torch.equal(tensor_names.convert(tensors, table)["embed.weight"].read(), expected)


def test_a_bare_llm_with_a_second_head(parts_of: tuple[Path, Path], tmp_path: Path, change: Change) -> None:
    folder = shutil.copytree(parts_of[1], tmp_path / "llm")
    change(folder / "config.json", tie_word_embeddings=True)
    with pytest.raises(InputError, match=r"lm_head\.weight.*differ.*tie_word_embeddings false"):
        open_llm(folder)


def test_two_versions_of_the_weights(hf: Callable[[str], Path]) -> None:
    folder = hf("llava")
    tensors = load_file(folder / "model.safetensors")
    torch.save({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    open_weights(folder)  # another type of the same values
    name = "language_model.model.norm.weight"
    torch.save(tensors | {name: tensors[name] + 1}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=rf"model\.safetensors and pytorch_model\.bin .* {name}"):
        open_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    open_weights(folder)


@pytest.mark.parametrize("second", ["mm_projector.bin", "non_lora_trainables.bin"])
def test_a_projector_beside_the_weights(original: Callable[..., Path], second: str) -> None:
    folder = original()
    tensors = torch.load(folder / "pytorch_model.bin")
    projector = {name: tensor for name, tensor in tensors.items() if "mm_projector" in name}
    torch.save({f"base_model.model.{n}": t for n, t in projector.items()}, folder / second)
    open_original(folder)
    torch.save({f"base_model.model.{n}": t + 1 for n, t in projector.items()}, folder / second)
    with pytest.raises(InputError, match=rf"pytorch_model\.bin and .*mm_projector.* in {second}"):
        open_original(folder)


def test_a_second_tower_in_the_folder(original: Callable[..., Path], parts_of: tuple[Path, Path]) -> None:
    folder = original()
    shutil.copy(parts_of[0] / "model.safetensors", folder / "eye")
    open_original(folder)
    assert any("not those of" in note for note in open_original(folder, tower=str(parts_of[0])).notes)
    with_tensors(folder / "eye", lambda tensors: tensors[next(iter(tensors))].add_(1))
    with pytest.raises(
        InputError, match=r"vision_tower.* in pytorch_model\.bin and .* in model\.safetensors"
    ):
        open_original(folder)


def test_a_tower_that_stands_twice_in_one_file(parts_of: tuple[Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(parts_of[0], tmp_path / "tower")
    # Versions of transformers write the names with "vision_model." before them, or without.
    first = min(load_file(folder / "model.safetensors"))
    before = "vision_model."
    other = first.removeprefix(before) if first.startswith(before) else before + first
    with_tensors(folder, lambda tensors: tensors.update({other: tensors[first].clone()}))
    with pytest.raises(InputError, match="unknown "):
        open_tower(folder)


@pytest.fixture
def lora(llava: Llavas, tmp_path: Path, change: Change) -> Callable[..., Path]:
    def make(tensors: dict[str, Tensor] | None = None, **values: Any) -> Path:
        folder = tmp_path / "lora"
        folder.mkdir(exist_ok=True)
        names = [f"base_model.model.model.language_model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
        adapters = {f"{name}.lora_A.weight": torch.ones(2, 32) for name in names}
        adapters |= {f"{name}.lora_B.weight": torch.ones(32, 2) for name in names}
        save_file(adapters | (tensors or {}), folder / "adapter_model.safetensors")
        change(folder / "adapter_config.json", **{
            "peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": str(llava("llava")),
        } | values)  # fmt: skip
        return folder

    return make


def test_an_adapter_under_two_names(llava: Llavas, lora: Callable[..., Path]) -> None:
    other = "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight"
    base = open_hf(llava("llava"))
    assert adapt(base, lora({other: torch.ones(2, 32)})).config.lora
    with pytest.raises(InputError, match=r"q_proj\.lora_A\.weight .*q_proj\.lora_A\.weight .*differ"):
        adapt(base, lora({other: torch.zeros(2, 32)}))


def test_an_adapter_that_its_config_does_not_list(llava: Llavas, lora: Callable[..., Path]) -> None:
    base = open_hf(llava("llava"))
    assert adapt(base, lora(target_modules=["q_proj", "v_proj"])).config.lora
    with pytest.raises(InputError, match=r"target_modules is v_proj, but .*q_proj.* adapts another layer"):
        adapt(base, lora(target_modules=["v_proj"]))


def test_a_weight_that_was_trained_beside_the_adapter(llava: Llavas, lora: Callable[..., Path]) -> None:
    base = open_hf(llava("llava"))
    head = base.state["decoder.head.weight"].read()
    assert adapt(base, lora({"base_model.model.lm_head.weight": head})).config.lora
    with pytest.raises(InputError, match=r"lm_head\.weight .*was trained outside the adapter.*differs"):
        adapt(base, lora({"base_model.model.lm_head.weight": head + 1}))


def test_which_adapters_were_merged_and_where(llava: Llavas, lora: Callable[..., Path]) -> None:
    name = "base_model.model.model.language_model.layers.1.self_attn.v_proj"
    head = "base_model.model.lm_head"
    some = {f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(16, 2)}
    some |= {f"{head}.lora_A.weight": torch.ones(2, 32), f"{head}.lora_B.weight": torch.ones(288, 2)}
    notes = adapt(open_hf(llava("llava")), lora(some)).notes
    assert [note for note in notes if "merged" in note] == [
        "adapters merged into the weights of the LLM's blocks: 3, as the blocks do not all have the same",
        "adapters merged into the weights outside the LLM's blocks: 1",
    ]


def test_a_whole_model_with_a_lora_inside(hf: Callable[[str], Path], lora: Callable[..., Path]) -> None:
    folder, adapter = hf("llava"), lora()
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    with pytest.raises(InputError, match=r"a whole model \(model\.safetensors\) and a LoRA"):
        read_model(folder)


def test_a_lora_beside_a_whole_llm_of_the_original_code(
    original: Callable[..., Path], lora: Callable[..., Path], parts_of: tuple[Path, Path]
) -> None:
    folder = original()
    shutil.copytree(lora(base_model_name_or_path=str(parts_of[1])), folder, dirs_exist_ok=True)
    assert open_original(folder).config.lora
    tensors = torch.load(folder / "pytorch_model.bin")
    name = "model.layers.0.mlp.up_proj.weight"
    torch.save(tensors | {name: tensors[name] + 1}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=rf"{name} in model\.safetensors and {name} in pytorch_model\.bin"):
        open_original(folder)


def test_a_matrix_in_two_files_of_a_pumice_folder(tmp_path: Path, tiny_folder: Path) -> None:
    from pumice.formats.import_ import import_model

    shutil.copytree(tiny_folder, tmp_path / "plain")
    import_model(str(tiny_folder), tmp_path / "few", quantize="int8")
    for path in (tmp_path / "few").glob("quantized.*"):
        shutil.copy(path, tmp_path / "plain")
    with pytest.raises(InputError, match=r"is in model\.safetensors and in quantized\.safetensors"):
        open_parts(tmp_path / "plain")


def test_a_name_twice_in_a_gguf_file(tmp_path: Path, write_gguf: Callable[..., Any]) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path)
    data = path.read_bytes()
    assert data.count(b"blk.1.ffn_up.weight") == 1
    path.write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight"))
    with pytest.raises(InputError, match=r"two tensors of the name blk\.0\.ffn_up\.weight"):
        GgufFile(path)


# Tensors that the config decides

INV_FREQ = "language_model.model.layers.1.self_attn.rotary_emb.inv_freq"
NORM = "language_model.model.norm.weight"
POSITIONS = "vision_tower.vision_model.embeddings.position_ids"


def frequencies(folder: Path, times: float = 1.0, scaling: RopeScaling | None = None) -> Tensor:
    """Rotary frequencies of the folder's config, but for so many times its rope_theta."""
    config = open_hf(folder).config.decoder
    return rope_inv_freq(config.head_dim, config.rope_theta * times, scaling, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_stored_frequencies_must_be_those_of_the_config(
    hf: Callable[[str], Path], dtype: torch.dtype
) -> None:
    folder = hf("llava")
    names = open_hf(folder).state.keys()
    with_tensors(folder, lambda tensors: tensors.update({INV_FREQ: frequencies(folder).to(dtype)}))
    assert open_hf(folder).state.keys() == names
    wrong = frequencies(folder, times=1.1).to(dtype)
    with_tensors(folder, lambda tensors: tensors.update({INV_FREQ: wrong}))
    with pytest.raises(
        InputError, match=rf"{INV_FREQ} in model\.safetensors is not what rope_theta 10000 and"
    ):
        open_hf(folder)
    with_tensors(folder, lambda tensors: tensors.update({INV_FREQ: torch.full_like(wrong, torch.nan)}))
    with pytest.raises(InputError, match=r"\(its value 0 is nan, not 1\)"):
        open_hf(folder)


def test_stored_frequencies_may_be_slowed_or_not(hf: Callable[[str], Path], change: Change) -> None:
    """Older code of transformers divided the positions instead, and stored what is not slowed."""
    folder = hf("llava")
    unscaled = frequencies(folder)
    slowed, slower = (frequencies(folder, 1.0, RopeScaling("linear", factor)) for factor in (4.0, 8.0))
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    change(folder / "config.json", text_config__rope_parameters=rope)
    for right in (unscaled, slowed):
        with_tensors(folder, lambda tensors, values=right: tensors.update({INV_FREQ: values}))
        assert open_hf(folder).config.decoder.rope_scaling == RopeScaling("linear", 4.0)
    with_tensors(folder, lambda tensors: tensors.update({INV_FREQ: slower}))
    with pytest.raises(InputError, match=r"rope_theta 10000, slowed as linear, and heads"):
        open_hf(folder)


def test_weights_of_whole_numbers_are_refused(hf: Callable[[str], Path]) -> None:
    """They are another quantisation's, and would be computed with as they are."""
    folder = hf("llava")
    with_tensors(folder, lambda tensors: tensors.update({NORM: tensors[NORM].to(torch.int8)}))
    with pytest.raises(
        InputError, match=rf"{NORM} in model\.safetensors holds whole numbers \(int8\), no weig"
    ):
        open_hf(folder)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16])
def test_stored_positions_must_be_in_order(hf: Callable[[str], Path], dtype: torch.dtype) -> None:
    folder = hf("llava")
    names, grid = open_hf(folder).state.keys(), open_hf(folder).config.vision.grid
    right = torch.arange(grid**2 + 1)[None].to(dtype)
    with_tensors(folder, lambda tensors: tensors.update({POSITIONS: right}))
    assert open_hf(folder).state.keys() == names
    for wrong in (right.flip(1), right[:, :-1]):
        with_tensors(folder, lambda tensors, values=wrong: tensors.update({POSITIONS: values.contiguous()}))
        with pytest.raises(InputError, match=rf"{POSITIONS} in .* is not what the tower's {grid**2 + 1} pos"):
            open_hf(folder)
