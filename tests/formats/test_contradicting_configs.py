"""Configs, classes and tensors that speak of different models: every pair is told or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pumice.errors import InputError
from pumice.formats.components import open_tower
from pumice.formats.export import export
from pumice.formats.families import FAMILIES
from pumice.formats.gguf.llm import open_gguf
from pumice.formats.hf.read import open_hf
from pumice.formats.llava.read import open_original
from pumice.formats.read import read_model
from pumice.formats.recognise import FormatKind, recognise

Llavas = Callable[[str], Path]
Change = Callable[..., None]


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
        ("llava", "LlavaQwenForCausalLM", r"the language model is a qwen2, but its tensors .*q_proj\.bias"),
        ("phi", "LlavaPhiForCausalLM", r"model_type is 'phi' \(architectures is LlavaPhiForCausalLM\)"),
    ],
)
def test_what_contradicts_in_the_original_code(
    original: Callable[..., Path], model_type: str, architecture: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        open_original(original(model_type=model_type, architectures=architecture.split()))


def test_an_unknown_class_is_told(
    original: Callable[..., Path], hf: Callable[[str], Path], tmp_path: Path, change: Change
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
        ("llava", {"image_token_index": 4}, "index is 4, but the tokenizer gives <image> the id 3"),
        ("llava", {"text_config__rope_theta": 5e5}, "rope_theta is 10000, but 500000.0 in"),
        (
            "llava",
            {"text_config__rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_parameters and rope_scaling differ",
        ),
        ("llava", {"mm_vision_tower": "x", "architectures": None}, "has mm_vision_tower, .* and text_config"),
    ],
)
def test_what_contradicts_in_a_folder_of_transformers(
    hf: Callable[[str], Path], kind: str, values: dict[str, Any], message: str, change: Change
) -> None:
    folder = hf(kind)
    change(folder / "config.json", **values)
    with pytest.raises(InputError, match=message):
        read_model(folder)


def test_with_the_keys_of_both_codes_the_class_decides(hf: Callable[[str], Path], change: Change) -> None:
    folder = hf("llava")
    change(folder / "config.json", mm_vision_tower="x")
    assert recognise(folder) is FormatKind.HF
    change(folder / "config.json", architectures=["LlavaLlamaForCausalLM"])
    assert recognise(folder) is FormatKind.ORIGINAL


def test_a_clip_that_says_siglip(parts_of: tuple[Path, Path], tmp_path: Path, change: Change) -> None:
    folder = shutil.copytree(parts_of[0], tmp_path / "tower")
    change(folder / "config.json", model_type="siglip_vision_model")
    with pytest.raises(InputError, match="'siglip_vision_model', but architectures is 'CLIPVisionModel'"):
        open_tower(folder)
    change(folder / "config.json", architectures=None)
    with pytest.raises(InputError, match=r"of kind siglip, but its tensors hold .*class_embedding"):
        open_tower(folder)


def test_a_tower_that_contradicts_what_is_around_it(
    original: Callable[..., Path], parts_of: tuple[Path, Path], tmp_path: Path, change: Change
) -> None:
    folder = shutil.copytree(parts_of[0], tmp_path / "tower")
    own = json.loads((folder / "config.json").read_text())
    change(folder / "config.json", model_type="siglip", architectures=None, vision_config=own)
    with pytest.raises(InputError, match="'siglip', of a siglip, but vision_config describes a clip"):
        open_tower(folder)
    folder = original()
    change(folder / "eye" / "config.json", model_type="siglip_vision_model")
    with pytest.raises(InputError, match=r"of kind siglip, but its tensors hold .*class_embedding"):
        open_original(folder)


def test_a_bare_llm_of_another_class(parts_of: tuple[Path, Path], tmp_path: Path, change: Change) -> None:
    folder = shutil.copytree(parts_of[1], tmp_path / "llm")
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


def test_two_ties_that_differ_are_told(hf: Callable[[str], Path], change: Change) -> None:
    folder = hf("siglip")
    change(folder / "config.json", tie_word_embeddings=False, text_config__tie_word_embeddings=True)
    loaded = open_hf(folder)
    assert loaded.config.decoder.tied_head
    assert any("tie_word_embeddings is false in config.json and true" in note for note in loaded.notes)


# A row of FAMILIES, and a checkpoint of another family
LANGUAGE_MODELS = {
    "llama": "CLIP + Llama, pad (LLaVA 1.5)",
    "qwen2": "SigLIP + Qwen2, squash",
    "qwen3": "CLIP + Qwen3, crop",
    "gemma2": "SigLIP + Gemma 2, squash",
}


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_a_checkpoint_of_another_family_than_its_config_says(
    models: ModuleType, family: str, tmp_path: Path, change: Change
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
    models: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change
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
