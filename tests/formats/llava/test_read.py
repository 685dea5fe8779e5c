"""Folders of the original LLaVA: whole, a projector or a LoRA on a base; what is missing is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pumice.errors import InputError
from pumice.formats import names as tensor_names
from pumice.formats.hf.read import open_hf
from pumice.formats.llava.read import open_original
from pumice.formats.load import open_model, shapes
from pumice.formats.pumice.folder import check
from pumice.storage.parts import LoadedParts

Parts = tuple[Path, Path]
MLP = tensor_names.ORIGINAL_CONNECTORS["mlp2x_gelu"]
TEXT: dict[str, Any] = {
    "vocab_size": 288, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
LLAVA: dict[str, Any] = {
    "model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch", "mm_use_im_start_end": False, "image_aspect_ratio": "pad",
    "mm_hidden_size": 24, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture
def llava_state(llava: Callable[[str], Path]) -> dict[str, Tensor]:
    """All tensors of a LLaVA under the original's names."""
    loaded = open_hf(llava("llava"))
    names = tensor_names.inverse(
        tensor_names.llava(loaded.config, tensor_names.ORIGINAL, MLP, "vision_model.")
    )
    return {str(names[our_name]): tensor.read() for our_name, tensor in loaded.state.items()}


@pytest.fixture
def make(tmp_path: Path, parts_of: Parts, llava_state: dict[str, Tensor]) -> Callable[..., Path]:
    """Write a folder with the tensors for which `keep` is true, and config.json."""

    def make(keep: Callable[[str], bool] | None = None, name: str = "m", **values: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config = TEXT | LLAVA | {"mm_vision_tower": str(parts_of[0])} | values
        config = {key: value for key, value in config.items() if value != "absent"}
        (folder / "config.json").write_text(json.dumps(config))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((parts_of[1] / file).read_bytes())
        tensors = {n: t for n, t in llava_state.items() if keep is None or keep(n)}
        if tensors:
            torch.save(tensors, folder / "pytorch_model.bin")
        return folder

    return make


def is_tower(name: str) -> bool:
    return "vision_tower" in name


def equal(actual: LoadedParts, expected: LoadedParts) -> None:
    check(actual.state, shapes(actual.config), "here")
    assert actual.state.keys() == expected.state.keys()
    assert all(torch.equal(actual.state[n].read(), t.read()) for n, t in expected.state.items())


@pytest.mark.parametrize("tower", ["in the shards", "where the config says"])
def test_a_whole_folder(make: Callable[..., Path], llava: Callable[[str], Path], tower: str) -> None:
    folder = make(None if tower == "in the shards" else lambda name: not is_tower(name))
    loaded = open_original(folder)
    equal(loaded, open_hf(llava("llava")))
    config = loaded.config
    assert (config.template, config.bos_token_id, config.stop_token_ids) == ("v1", 1, (2,))
    assert len(loaded.notes) == 1  # of the chat format, in test_contradicting_processors
    assert (config.image.mode, config.image.pad_color) == ("pad", (122, 116, 104))
    assert (config.vision.layer, config.vision.select, config.connector.kind) == (-2, "patch", "mlp2x_gelu")


def test_the_tower_may_stand_in_the_folder_or_be_given(make: Callable[..., Path], parts_of: Parts) -> None:
    folder = make(lambda name: not is_tower(name), mm_vision_tower="eye")
    with pytest.raises(InputError, match=r"the vision tower of .*config\.json: there is no 'eye'.*--tower"):
        open_original(folder)
    assert open_original(folder, tower=str(parts_of[0])).config.vision.depth == 3
    (folder / "eye").symlink_to(parts_of[0])
    assert open_original(folder).sources["tower"] == (str(folder / "eye"), folder / "eye")


def test_the_first_version_had_one_layer_and_marked_pictures(
    make: Callable[..., Path], llava_state: dict[str, Tensor]
) -> None:
    folder = make(lambda name: "mm_projector" not in name, mm_projector_type="absent",
                  image_aspect_ratio="absent", mm_use_im_start_end=True)  # fmt: skip
    first = {f"model.mm_projector.{p}": llava_state[f"model.mm_projector.0.{p}"] for p in ("weight", "bias")}
    torch.save(first, folder / "mm_projector.bin")
    opened = open_model(folder)
    config = opened.model.config
    assert config.connector.kind == "linear"
    assert config.image.mode == "crop"
    assert config.image_wrap == ("<im_start>", "<im_end>")
    assert torch.equal(opened.model.connector.layers[0].weight, first["model.mm_projector.weight"])


@pytest.mark.parametrize(
    "prefix", ["model.mm_projector.", "mm_projector.", "base_model.model.model.mm_projector."]
)
def test_a_projector_on_a_base(
    make: Callable[..., Path], llava_state: dict[str, Tensor], parts_of: Parts, llava: Any, prefix: str
) -> None:
    folder = make(lambda name: False, _name_or_path="lmsys/vicuna-7b-v1.5")
    projector = {n: t for n, t in llava_state.items() if "mm_projector" in n}
    torch.save(
        {n.replace("model.mm_projector.", prefix): t for n, t in projector.items()},
        folder / "mm_projector.bin",
    )
    with pytest.raises(InputError, match=r"holds no language model.*--base.*'lmsys/vicuna-7b-v1\.5'"):
        open_original(folder)
    loaded = open_original(folder, base=str(parts_of[1]))
    equal(loaded, open_hf(llava("llava")))
    assert loaded.sources["base"] == (str(parts_of[1]), parts_of[1])


@pytest.mark.parametrize("base", ["a bare LLM", "a whole LLaVA"])
def test_a_lora_with_its_non_lora_trainables(
    make: Callable[..., Path], llava_state: dict[str, Tensor], parts_of: Parts, base: str
) -> None:
    other = {n: t + 1 for n, t in llava_state.items() if "mm_projector" in n}
    under = parts_of[1] if base == "a bare LLM" else make(name="base")
    folder = make(lambda name: False)
    torch.save({f"base_model.model.{n}": t for n, t in other.items()}, folder / "non_lora_trainables.bin")
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in ("q", "v")]
    low, high = torch.randn(3, 32), {"q": torch.randn(32, 3), "v": torch.randn(16, 3)}
    adapter = {f"base_model.model.{n}.lora_A.weight": low.clone() for n in names}
    adapter |= {f"base_model.model.{n}.lora_B.weight": high[n[-6]].clone() for n in names}
    save_file(adapter, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "base_model_name_or_path": str(under)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    loaded = open_original(folder)
    assert loaded.config.lora is not None
    assert (loaded.config.lora.rank, loaded.config.lora.alpha, loaded.config.lora.targets) == (
        3,
        6.0,
        ("q", "v"),
    )
    check(loaded.state, shapes(loaded.config), "here")
    assert torch.equal(loaded.state["connector.layers.2.bias"].read(), other["model.mm_projector.2.bias"])
    merged = open_model(folder).model.decoder.blocks[1].attention.v.weight
    plain = llava_state["model.layers.1.self_attn.v_proj.weight"]
    torch.testing.assert_close(merged, plain + 2 * high["v"] @ low, atol=1e-5, rtol=0)


def test_tiles(make: Callable[..., Path], llava_state: dict[str, Tensor]) -> None:
    newline = torch.randn(32)
    values = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
    for number, points in enumerate(([[16, 32], [32, 16]], "[(16, 32), (32, 16)]", "(1x1),...,(2x2)")):
        folder = make(name=str(number), image_grid_pinpoints=points, **values)
        torch.save(llava_state | {"model.image_newline": newline}, folder / "pytorch_model.bin")
        loaded = open_original(folder)
        assert loaded.config.image.pinpoints[:2] == (
            ((16, 16), (16, 32)) if number == 2 else ((16, 32), (32, 16))
        )
        assert torch.equal(loaded.state["image_newline"].read(), newline)
        assert loaded.config.image.several == "tiles"
    folder = make(name="max", image_grid_pinpoints=points, **values | {"image_aspect_ratio": "anyres_max_4"})
    torch.save(llava_state | {"model.image_newline": newline}, folder / "pytorch_model.bin")
    assert open_original(folder).config.image.several == "square"
    with pytest.raises(InputError, match=r'mm_patch_merge_type is "flat"; only "spatial_unpad" or "spatial"'):
        open_original(make(name="flat", image_aspect_ratio="anyres", image_grid_pinpoints=[[16, 32]]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llava_mpt"}, "model_type is 'llava_mpt'; llava, llava_llama"),
        ({"mm_projector_type": "mlp2x_res"}, "mm_projector_type is 'mlp2x_res'; linear, mlpNx_gelu"),
        ({"mm_vision_select_feature": "cls"}, 'mm_vision_select_feature is "cls"'),
        ({"mm_hidden_size": 48}, r"mm_hidden_size is 48, but the tower .* has 24"),
        ({"image_aspect_ratio": "highres"}, "image_aspect_ratio is 'highres'"),
        (
            {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial", "image_grid_pinpoints": "("},
            r"image_grid_pinpoints is '\(', not a list",
        ),
        ({"mm_resampler_type": "qformer"}, 'mm_resampler_type is "qformer"'),
        ({"s2": True}, "s2 is true"),
        ({"num_hidden_layers": 1}, r"unknown model\.layers\.1"),
        ({"mm_projector_type": "mlp3x_gelu"}, r"missing model\.mm_projector\.4\.weight"),
    ],
)
def test_what_cannot_be_read(make: Callable[..., Path], values: dict[str, Any], message: str) -> None:
    folder = make(**values)
    with pytest.raises(InputError, match=message) as caught:
        open_original(folder)
    assert str(folder) in str(caught.value)
