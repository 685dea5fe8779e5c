"""A folder for the original code: its keys, its names, and that what it holds is read back bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from pumice.formats.export import export
from pumice.formats.read import read_model
from pumice.storage.tensors import open_weights

NAMES = {
    "LLaVA 1.0": "linear",
    "LLaVA 1.5": "mlp2x_gelu",
    "LLaVA 1.6": "mlp2x_gelu",
    "SigLIP + Qwen2": "mlp2x_gelu",
}


@pytest.mark.parametrize("part", NAMES)
def test_it_is_read_back_bit_for_bit(
    models: ModuleType, formats: ModuleType, tmp_path: Path, part: str
) -> None:
    [name] = [name for name in models.ARCHITECTURES if part in name]
    model = models.tiny(models.ARCHITECTURES[name])
    export(model, "llava", tmp_path / "out")
    back = read_model(tmp_path / "out", template=model.config.template)
    assert formats.same(model, back)
    assert back.config == model.config
    assert back.tokenizer.to_str() == model.tokenizer.to_str()


def test_config_and_names_are_the_original_ones(models: ModuleType, tmp_path: Path) -> None:
    model = models.tiny(models.ARCHITECTURES["CLIP + Mistral, anyres (LLaVA 1.6)"])
    export(model, "llava", tmp_path / "out", tower="openai/some-clip")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {
        "architectures": ["LlavaMistralForCausalLM"],
        "model_type": "llava_mistral",
        "mm_vision_tower": "openai/some-clip",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 32,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]],
        "unfreeze_mm_vision_tower": True,
    }
    assert {key: config[key] for key in expected} == expected
    tensors = open_weights(tmp_path / "out")
    assert {
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.mm_projector.0.weight",
        "model.mm_projector.2.bias",
        "model.image_newline",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight",
    } <= set(tensors)
    # The folder itself says what the tower is, so that reading it needs no hub.
    assert read_model(tmp_path / "out", template=model.config.template).config == model.config


def test_the_start_and_end_of_a_picture_are_kept(models: ModuleType, tmp_path: Path) -> None:
    model = models.tiny(models.ARCHITECTURES["CLIP + Llama, pad (LLaVA 1.5)"])
    model.tokenizer.add_special_tokens(["<im_start>", "<im_end>"])
    wrapped = replace(model.config, image_wrap=("<im_start>", "<im_end>"))
    grown = models.tiny(models.Architecture(wrapped, lambda: model.tokenizer))
    export(grown, "llava", tmp_path / "out")
    assert read_model(tmp_path / "out", template="v1").config == grown.config


@pytest.mark.parametrize(
    ("width", "named"), [(1024, "openai/clip-vit-large-patch14-336"), (1023, "vision_tower")]
)
def test_a_published_tower_is_named(models: ModuleType, width: int, named: str) -> None:
    from pumice.formats.llava.write import tower_name

    vision = replace(models.CLIP, image_size=336, width=width, depth=24, heads=16, mlp_width=4096)
    assert tower_name(vision) == named


def test_how_several_pictures_are_shown_comes_back_or_is_told(models: ModuleType, tmp_path: Path) -> None:
    model = models.tiny(models.ARCHITECTURES["LLaVA-OneVision, anyres_max"])
    cases = [  # max_tiles and several of the model, of what comes back, and how many notes speak of it
        (1, "square", (1, "square"), ["unless image_aspect_ratio is set to 'pad'"]),
        (None, "square", (4, "square"), ["unless image_aspect_ratio is set to 'pad'"]),
        (1, "tiles", (1, "square"), ["training shows each of several pictures as one square, this model in"]),
        (None, "tiles", (None, "tiles"), []),
    ]
    for number, (max_tiles, several, back, expected_note) in enumerate(cases):
        image = replace(model.config.image, max_tiles=max_tiles, several=several)
        changed = replace(model, config=replace(model.config, image=image))
        notes = export(changed, "llava", tmp_path / str(number)).notes
        image_policy = read_model(tmp_path / str(number), template=model.config.template).config.image
        assert (image_policy.max_tiles, image_policy.several) == back
        spoken = [note for note in notes if "several pictures" in note]
        assert len(spoken) == len(expected_note)
        assert all(words in note for words, note in zip(expected_note, spoken, strict=True))


def test_a_model_of_videos_is_told_that_its_files_do_not_say_so(models: ModuleType, tmp_path: Path) -> None:
    model = models.tiny(models.ARCHITECTURES["LLaVA-OneVision, anyres_max"])
    without = replace(model, config=replace(model.config, video=None))
    for source, told in ((model, True), (without, False)):
        notes = export(source, "llava", tmp_path / str(told)).notes
        assert any("trained on videos" in note for note in notes) is told
        assert read_model(tmp_path / str(told), template=model.config.template).config.video is None
