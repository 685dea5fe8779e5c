"""Folders whose statements about themselves contradict each other: every pair is told or refused by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pumice.config import RopeScaling
from pumice.errors import InputError
from pumice.formats import names as tensor_names
from pumice.formats.components import open_llm, open_tower
from pumice.formats.export import export
from pumice.formats.families import FAMILIES
from pumice.formats.gguf.file import GgufFile
from pumice.formats.gguf.llm import open_gguf
from pumice.formats.hf.read import open_hf
from pumice.formats.llava.read import open_original
from pumice.formats.peft.read import adapt
from pumice.formats.pumice.folder import open_parts
from pumice.formats.read import read_model
from pumice.formats.recognise import FormatKind, recognise
from pumice.model.layers import rope_inv_freq
from pumice.storage.tensors import open_weights

Llavas = Callable[[str], Path]
CHAT = (  # as the LLaVAs of these tests have it
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
HEAD, EMBED = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; `a__b` is the key b of the object a."""
    whole = json.loads(path.read_text()) if path.is_file() else {}
    for key, value in values.items():
        *above, last = key.split("__")
        place = whole
        for name in above:
            place = place[name]
        place[last] = value
    path.write_text(json.dumps(whole))


def with_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def hf(llava: Llavas, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a LLaVA of transformers, with the head and names of an older version."""

    def make(kind: str) -> Path:
        folder = copied(llava(kind), tmp_path / kind)
        loaded = open_hf(folder)
        table = tensor_names.llava(
            loaded.config, tensor_names.HF_NESTINGS[0], tensor_names.hf_connector(True), "vision_model."
        )
        names = tensor_names.inverse(table)
        state = {str(names[ours]): tensor.read() for ours, tensor in loaded.state.items()}
        save_file(state, folder / "model.safetensors")
        return folder

    return make


@pytest.fixture
def original(llava: Llavas, parts_of: tuple[Path, Path], tmp_path: Path) -> Callable[..., Path]:
    """A folder of the original code: a Llama's or, as `kind` onevision, a Qwen2's."""

    def make(kind: str = "llava", **values: Any) -> Path:
        loaded = open_hf(llava(kind))
        projector = tensor_names.ORIGINAL_CONNECTORS["mlp2x_gelu"]
        table = tensor_names.llava(loaded.config, tensor_names.ORIGINAL, projector, "vision_model.")
        names = tensor_names.inverse(table)
        folder = tmp_path / "original"
        folder.mkdir()
        state = {str(names[ours]): tensor.read() for ours, tensor in loaded.state.items()}
        torch.save(state, folder / "pytorch_model.bin")
        own = json.loads((llava(kind) / "config.json").read_text())
        tower = folder / "eye"
        tower.mkdir()
        change(tower / "config.json", **own["vision_config"])
        text = own["text_config"] | {"architectures": None}
        change(folder / "config.json", **text | {
            "model_type": "llava", "mm_projector_type": "mlp2x_gelu", "mm_vision_tower": "eye",
            "mm_vision_select_layer": -2, "image_aspect_ratio": "pad",
        } | values)  # fmt: skip
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(parts_of[1] / file, folder)
        return folder

    return make


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


def test_a_bare_llm_with_a_second_head(parts_of: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copied(parts_of[1], tmp_path / "llm")
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
    folder = copied(parts_of[0], tmp_path / "tower")
    # Versions of transformers write the names with "vision_model." before them, or without.
    first = min(load_file(folder / "model.safetensors"))
    before = "vision_model."
    other = first.removeprefix(before) if first.startswith(before) else before + first
    with_tensors(folder, lambda tensors: tensors.update({other: tensors[first].clone()}))
    with pytest.raises(InputError, match="unknown "):
        open_tower(folder)


@pytest.fixture
def lora(llava: Llavas, tmp_path: Path) -> Callable[..., Path]:
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


def test_stored_frequencies_may_be_slowed_or_not(hf: Callable[[str], Path]) -> None:
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


# `architectures`, model_type and tensors


@pytest.mark.parametrize("model_type", ["llava", "llava_qwen", "qwen2"])
def test_the_class_of_the_original_code_says_the_llm(
    original: Callable[..., Path], llava: Llavas, model_type: str
) -> None:
    folder = original(
        "onevision", model_type=model_type, architectures=["LlavaQwenForCausalLM"], mm_patch_merge_type="flat"
    )
    loaded = open_original(folder)
    assert loaded.config.decoder.qkv_bias
    told = "architectures is LlavaQwenForCausalLM: it was read as a qwen2, not as a llama" in loaded.notes
    assert told == (model_type == "llava")
    assert any("image_newline is stored" in note for note in loaded.notes)


def test_without_a_class_the_tensors_say_the_llm(original: Callable[..., Path]) -> None:
    loaded = open_original(original("onevision"))
    assert loaded.config.decoder.qkv_bias
    assert "by its tensors it is a qwen2" in loaded.notes


@pytest.mark.parametrize(
    ("model_type", "architecture", "message"),
    [
        ("llava", "LlavaQwenForCausalLM LlavaLlamaForCausalLM", "of a qwen2 and of a llama; correct"),
        ("llava_mistral", "LlavaQwenForCausalLM", "'llava_mistral', of a mistral, but .* of a qwen2"),
        ("llava", "LlavaQwenForCausalLM", r"it is a qwen2, but its tensors do not hold .*q_proj\.bias"),
        ("phi", "LlavaPhiForCausalLM", r"model_type is 'phi' \(architectures is LlavaPhiForCausalLM\)"),
    ],
)
def test_what_contradicts_in_the_original_code(
    original: Callable[..., Path], model_type: str, architecture: str, message: str
) -> None:
    with pytest.raises(InputError, match=message.replace("it is a qwen2", "the language model is a qwen2")):
        open_original(original(model_type=model_type, architectures=architecture.split()))


def test_an_unknown_class_is_told(
    original: Callable[..., Path], hf: Callable[[str], Path], tmp_path: Path
) -> None:
    loaded = open_original(original(architectures=["LlavaMineForCausalLM"]))
    assert any("LlavaMineForCausalLM, which is unknown here" in note for note in loaded.notes)
    change(tmp_path / "original" / "config.json", architectures=["LlavaForConditionalGeneration"])
    loaded = open_original(tmp_path / "original")
    assert any("Generation, which the original code does not write" in note for note in loaded.notes)
    folder = hf("llava")
    change(folder / "config.json", architectures=["MyModel"])
    assert any("MyModel, which is unknown here" in note for note in open_hf(folder).notes)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("llava", {"architectures": ["LlavaNextForConditionalGeneration"]}, "'llava', but architectures is"),
        (
            "llava",
            {"architectures": ["LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration"]},
            "is 'llava', but architectures is 'LlavaNextForConditionalGeneration'",
        ),
        ("llava", {"text_config__architectures": ["Qwen2ForCausalLM"]}, "text_config: model_type is 'llama'"),
        ("llava", {"vision_config__architectures": ["SiglipVisionModel"]}, "vision_config: model_type is"),
        ("siglip", {"text_config__model_type": "llama"}, r"is no qwen3, but its tensors hold .*q_norm"),
        (
            "onevision",
            {"text_config__model_type": "llama"},
            r"is no qwen2, but its tensors hold .*q_proj\.bias",
        ),
        ("llava", {"text_config__model_type": "qwen2"}, r"is a qwen2, but its tensors do not hold .*q_proj"),
        (
            "next",
            {"model_type": "llava", "architectures": None},
            "'llava', but the tensors hold image_newline",
        ),
        ("llava", {"image_token_id": 3, "image_token_index": 4}, "id is 3, but image_token_index is 4"),
        ("llava", {"mm_vision_tower": "x", "architectures": None}, "has mm_vision_tower, .* and text_config"),
    ],
)
def test_what_contradicts_in_a_folder_of_transformers(
    hf: Callable[[str], Path], kind: str, values: dict[str, Any], message: str
) -> None:
    folder = hf(kind)
    change(folder / "config.json", **values)
    with pytest.raises(InputError, match=message):
        read_model(folder)


def test_with_the_keys_of_both_codes_the_class_decides(hf: Callable[[str], Path]) -> None:
    folder = hf("llava")
    change(folder / "config.json", mm_vision_tower="x")
    assert recognise(folder) is FormatKind.HF
    change(folder / "config.json", architectures=["LlavaLlamaForCausalLM"])
    assert recognise(folder) is FormatKind.ORIGINAL


def test_a_clip_that_says_siglip(parts_of: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copied(parts_of[0], tmp_path / "tower")
    change(folder / "config.json", model_type="siglip_vision_model")
    with pytest.raises(InputError, match="'siglip_vision_model', but architectures is 'CLIPVisionModel'"):
        open_tower(folder)
    change(folder / "config.json", architectures=None)
    with pytest.raises(InputError, match=r"of kind siglip, but its tensors hold .*class_embedding"):
        open_tower(folder)


def test_a_tower_that_contradicts_what_is_around_it(
    original: Callable[..., Path], parts_of: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = copied(parts_of[0], tmp_path / "tower")
    own = json.loads((folder / "config.json").read_text())
    change(folder / "config.json", model_type="siglip", architectures=None, vision_config=own)
    with pytest.raises(InputError, match="'siglip', of a siglip, but vision_config describes a clip"):
        open_tower(folder)
    folder = original()
    change(folder / "eye" / "config.json", model_type="siglip_vision_model")
    with pytest.raises(InputError, match=r"of kind siglip, but its tensors hold .*class_embedding"):
        open_original(folder)


def test_a_bare_llm_of_another_class(parts_of: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copied(parts_of[1], tmp_path / "llm")
    change(folder / "config.json", architectures=["MyLlamaForCausalLM"])
    assert any("MyLlamaForCausalLM, which is unknown" in note for note in read_model(folder).notes)
    change(folder / "config.json", architectures=["MistralForCausalLM"])
    with pytest.raises(InputError, match="'llama', but architectures is 'MistralForCausalLM'"):
        read_model(folder)
    change(folder / "config.json", model_type="yi")
    with pytest.raises(
        InputError, match=r"'yi', which cannot be read \(architectures is 'MistralForCausalLM'"
    ):
        read_model(folder)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_a_gguf_file_with_the_tensors_of_another_architecture(
    tmp_path: Path, write_gguf: Callable[..., Any], kind: str
) -> None:
    write_gguf(tmp_path / "m.gguf", kind=kind)
    with pytest.raises(InputError, match=f"general.architecture is '{kind}', but its blocks hold neither"):
        open_gguf(tmp_path / "m.gguf")


def test_two_ties_that_differ_are_told(hf: Callable[[str], Path]) -> None:
    folder = hf("siglip")
    change(folder / "config.json", tie_word_embeddings=False, text_config__tie_word_embeddings=True)
    loaded = open_hf(folder)
    assert loaded.config.decoder.tied_head
    assert any("tie_word_embeddings is false in config.json and true" in note for note in loaded.notes)


PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"


@pytest.mark.parametrize(
    ("kind", "file", "values", "message"),
    [
        (
            "llava",
            PREPROCESSOR,
            {"image_processor_type": "LlavaNextImageProcessorFast"},
            "model_type is 'llava'",
        ),
        ("next", PREPROCESSOR, {"image_processor_type": "LlavaOnevisionImageProcessor"}, "is 'llava_next'"),
        ("onevision", PROCESSOR, {"vision_aspect_ratio": "anyres_max_9"}, "but 'anyres_max_4' in .*config"),
        ("llava", PROCESSOR, {"image_token": "<pad>"}, "'<pad>', whose id is 4, but image_token_index is 3"),
        ("llava", "tokenizer_config.json", {"image_token": "<picture>"}, "which the tokenizer lacks, but"),
    ],
)
def test_a_processor_of_another_model(
    hf: Callable[[str], Path], kind: str, file: str, values: dict[str, Any], message: str
) -> None:
    folder = hf(kind)
    change(folder / file, **values)
    with pytest.raises(InputError, match=message):
        open_hf(folder)


@pytest.mark.parametrize(
    ("file", "values", "note"),
    [
        (PROCESSOR, {"processor_class": "LlavaNextProcessor"}, "LlavaNextProcessor in processor_config.json"),
        (
            "tokenizer_config.json",
            {"processor_class": "LlavaOnevisionProcessor"},
            "OnevisionProcessor in token",
        ),
        (
            PROCESSOR,
            {"num_additional_image_tokens": 0},
            "tokens is 0 in processor_config.json, but a clip has 1",
        ),
        ("config.json", {"vision_aspect_ratio": "anyres_max_9"}, "which model_type 'llava' does not use"),
        ("config.json", {"image_grid_pinpoints": [[16, 32]]}, "config.json has image_grid_pinpoints, which"),
        (PROCESSOR, {"image_processor": {"do_pad": True, "size": 16}}, "another size than processor_config"),
        ("tokenizer_config.json", {"bos_token": "<nope>"}, "name '<nope>' as its bos token, but"),
        ("tokenizer_config.json", {"eos_token": "<nope>"}, "name '<nope>' as its eos token, but"),
        (
            "tokenizer_config.json",
            {"chat_template": CHAT.replace("<|im_end|>", "<|eot|>")},
            r"ends answers with '<\|eot\|>', which is no token",
        ),
    ],
)
def test_what_the_other_files_contradict_is_told(
    hf: Callable[[str], Path], file: str, values: dict[str, Any], note: str
) -> None:
    folder = hf("llava")
    change(folder / PREPROCESSOR, do_pad=True)
    assert open_hf(folder).notes == ()
    change(folder / file, **values)
    (told,) = open_hf(folder).notes
    assert re.search(note, told)


@pytest.mark.parametrize(("name", "value"), [("patch_size", 14), ("vision_feature_select_strategy", "full")])
def test_the_processor_must_repeat_the_config(hf: Callable[[str], Path], name: str, value: Any) -> None:
    folder = hf("llava")
    change(folder / "processor_config.json", patch_size=4, vision_feature_select_strategy="default")
    open_hf(folder)
    change(folder / "processor_config.json", **{name: value})
    with pytest.raises(InputError, match=rf"processor_config\.json: {name} is .*, but .* in .*config\.json"):
        open_hf(folder)


# Chat templates

OTHER = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"


def test_chat_templates_that_differ_are_told(hf: Callable[[str], Path]) -> None:
    folder = hf("llava")
    own = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    (folder / "chat_template.jinja").write_text(own + "{# the same #}")
    assert not any("chat templates" in note for note in open_hf(folder).notes)
    change(folder / "chat_template.json", chat_template=OTHER)
    loaded = open_hf(folder)
    assert loaded.config.template == "chatml"
    assert any("hold chat templates that write different formats" in note for note in loaded.notes)


def test_the_assumed_format_of_the_original_code_is_told_truly(original: Callable[..., Path]) -> None:
    folder = original()
    (note,) = open_original(folder).notes
    assert note.startswith("the tokenizer's chat template writes another format (chatml, --template own")
    change(folder / "tokenizer_config.json", chat_template="{{ messages }}")
    (note,) = open_original(folder).notes
    assert note.startswith("v1 was assumed; the tokenizer's chat template, which is no such format")
    change(folder / "tokenizer_config.json", chat_template=None)
    assert open_original(folder).notes == ("no file says the chat format; v1 was assumed",)


def test_the_place_of_an_error_is_named_once(hf: Callable[[str], Path]) -> None:
    folder = hf("onevision")
    change(folder / "config.json", **{
        "text_config__use_sliding_window": True, "text_config__sliding_window": 8,
        "text_config__layer_types": ["full_attention", "sliding_attention"],
    })  # fmt: skip
    with pytest.raises(InputError, match="layer_types gives a sliding_window") as caught:
        open_hf(folder)
    assert str(caught.value).count("config.json") == 1


# A row of FAMILIES, and a checkpoint of another family
LANGUAGE_MODELS = {
    "llama": "CLIP + Llama, pad (LLaVA 1.5)",
    "qwen2": "SigLIP + Qwen2, squash",
    "qwen3": "CLIP + Qwen3, crop",
    "gemma2": "SigLIP + Gemma 2, squash",
}


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_a_checkpoint_of_another_family_than_its_config_says(
    models: ModuleType, family: str, tmp_path: Path
) -> None:
    """The class agrees with the wrong model_type, so that only the tensors tell."""
    export(models.tiny(models.ARCHITECTURES[LANGUAGE_MODELS[family]]), "hf", tmp_path / "out")
    for other in LANGUAGE_MODELS.keys() - {family}:
        change(
            tmp_path / "out" / "config.json",
            text_config__model_type=other,
            text_config__architectures=[FAMILIES[other].class_name],
        )
        with pytest.raises(InputError, match=r"by its config the language model is .*; correct"):
            read_model(tmp_path / "out")


def test_a_row_for_a_family_that_computes_more(
    models: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Granite's tensors are a Llama's; only keys of its config say that it computes something else."""
    monkeypatch.setitem(FAMILIES, "granite", replace(FAMILIES["llama"], class_name="GraniteForCausalLM"))
    export(models.tiny(models.ARCHITECTURES[LANGUAGE_MODELS["llama"]]), "hf", tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    change(path, text_config__model_type="granite", text_config__architectures=None)
    read_model(tmp_path / "out")
    change(path, text_config__residual_multiplier=0.22)
    with pytest.raises(InputError, match=r"residual_multiplier is 0\.22, which Pumice does not compute"):
        read_model(tmp_path / "out")
