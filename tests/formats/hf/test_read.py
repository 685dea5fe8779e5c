"""Folders of transformers' LLaVAs: the same numbers, in every nesting and file format, and strict errors."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pumice.config import IMAGE_TOKEN
from pumice.conversation import ImagePart
from pumice.errors import InputError
from pumice.formats import names as tensor_names
from pumice.formats.hf.read import open_hf
from pumice.formats.load import open_model, shapes
from pumice.formats.pumice.folder import check

# Of their preprocessor_config.json.
PIXELS: dict[str, Any] = {
    "do_resize": True, "size": {"shortest_edge": 16}, "do_center_crop": True,
    "crop_size": {"height": 16, "width": 16},
}  # fmt: skip

KINDS = ["llava", "siglip", "next", "next_video", "onevision"]
Llavas = Callable[[str], Path]
Change = Callable[..., None]


def picture(width: int = 40, height: int = 26) -> ImagePart:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return ImagePart(Image.fromarray(pixels))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_equal_those_of_transformers(llava: Llavas, kind: str) -> None:
    import transformers

    opened, image = open_model(llava(kind)), picture()
    layouts = opened.processor.layouts([image])
    pixels = torch.from_numpy(opened.processor.pixels([image], layouts))
    ids = torch.tensor([[1, 20, *[IMAGE_TOKEN] * layouts[0].tokens, 30, 40, 50]])
    model = opened.model
    actual = model.decoder.logits(model(ids, model.encode(pixels, layouts)))
    hf_model = transformers.AutoModelForImageTextToText.from_pretrained(llava(kind), dtype=torch.float32)
    tiles = kind in ("next", "next_video", "onevision")
    sizes = {"image_sizes": torch.tensor([[26, 40]])} if tiles else {}
    hf_pixels = pixels[None] if tiles else pixels
    expected = hf_model.eval()(input_ids=ids.where(ids >= 0, 3), pixel_values=hf_pixels, **sizes).logits
    assert expected.std() > 1
    difference = (actual - expected).abs().max().item()
    print(f"{kind}: {difference:.1e} of {expected.abs().max():.1f}")
    assert difference < 1e-4  # measured worst: 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_besides_tensors(llava: Llavas, kind: str) -> None:
    loaded = open_hf(llava(kind))
    config, image = loaded.config, loaded.config.image
    assert (config.decoder.vocab_size, loaded.tokenizer.get_vocab_size()) == (288, 271)
    assert (config.template, config.bos_token_id, config.stop_token_ids) == ("chatml", 1, (2, 8))
    assert config.vision.layer == (-1 if kind == "onevision" else -2)
    assert config.vision.select == ("full" if kind in ("siglip", "onevision") else "patch")
    modes = {"llava": "crop", "siglip": "squash"}
    assert image.mode == modes.get(kind, "anyres")
    if kind == "next":
        assert image.pinpoints == ((32, 16), (16, 32), (32, 32))  # width first
        assert (image.unpad, image.max_tiles) == (True, None)
    if kind == "onevision":
        assert image.max_tiles == 4
    assert config.decoder.tied_head == (kind == "siglip")
    assert config.decoder.sliding_window == (300 if kind == "next" else None)


def rewrite(source: Path, target: Path, nesting: tensor_names.Nesting, form: str) -> Path:
    """A copy of the folder with its tensors under other prefixes and in other files."""
    target.mkdir()
    for path in source.glob("*.json"):
        shutil.copy(path, target)
    loaded = open_hf(source)
    table = tensor_names.llava(loaded.config, nesting, tensor_names.hf_connector(True), "vision_model.")
    names = tensor_names.inverse(table)
    tensors = {str(names[our_name]): tensor.read() for our_name, tensor in loaded.state.items()}
    stem, ending = ("model", "safetensors") if "safetensors" in form else ("pytorch_model", "bin")
    put: Any = save_file if ending == "safetensors" else torch.save
    if not form.startswith("sharded"):
        put(tensors, target / f"{stem}.{ending}")
        return target
    file_of = {}
    for number in range(3):
        shard = dict(list(tensors.items())[number::3])
        file = f"{stem}-{number + 1:05d}-of-00003.{ending}"
        put(shard, target / file)
        file_of |= dict.fromkeys(shard, file)
    (target / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    return target


@pytest.mark.parametrize("nesting", tensor_names.HF_NESTINGS, ids=["old", "new"])
@pytest.mark.parametrize("form", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
def test_every_nesting_and_file_format(
    llava: Llavas, tmp_path: Path, nesting: tensor_names.Nesting, form: str
) -> None:
    expected = open_hf(llava("next"))
    loaded_again = open_hf(rewrite(llava("next"), tmp_path / "m", nesting, form))
    check(loaded_again.state, shapes(loaded_again.config), form)
    assert loaded_again.config == expected.config
    assert loaded_again.state.keys() == expected.state.keys()
    assert all(torch.equal(loaded_again.state[n].read(), t.read()) for n, t in expected.state.items())


def test_a_projector_without_biases_has_zeros(llava: Llavas, tmp_path: Path, change: Change) -> None:
    folder = rewrite(llava("llava"), tmp_path / "m", tensor_names.HF_NESTINGS[0], "bin")
    tensors = torch.load(folder / "pytorch_model.bin")
    torch.save({n: t for n, t in tensors.items() if "linear_1.bias" not in n and "linear_2.bias" not in n},
               folder / "pytorch_model.bin")  # fmt: skip
    change(folder / "config.json", multimodal_projector_bias=False)
    loaded = open_hf(folder)
    check(loaded.state, shapes(loaded.config), "here")
    assert not loaded.state["connector.layers.2.bias"].read().any()


@pytest.fixture
def folder(llava: Llavas, tmp_path: Path) -> Path:
    return rewrite(llava("llava"), tmp_path / "m", tensor_names.HF_NESTINGS[0], "sharded safetensors")


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("config.json", {"projector_hidden_act": "relu"}, 'projector_hidden_act is "relu"; only "gelu" can'),
        ("config.json", {"vision_feature_layer": [-2, -5]}, r"vision_feature_layer is \[-2, -5\]"),
        ("config.json", {"vision_feature_select_strategy": "cls"}, "select_strategy is 'cls'; of clip it is"),
        ("config.json", {"image_token_index": 280}, "image_token_index is 280, which the tokenizer lacks"),
        ("config.json", {"text_config__model_type": "gemma"}, "text_config: model_type is 'gemma'"),
        ("config.json", {"text_config__hidden_act": "gelu"}, 'text_config: hidden_act is "gelu"'),
        ("config.json", {"vision_config__hidden_act": "relu"}, 'vision_config: hidden_act is "relu"'),
        ("config.json", {"vision_config__num_channels": 4}, "num_channels is 4; only 3"),
        ("config.json", {"quantization_config": {"quant_method": "awq"}}, "are quantised by awq"),
        ("config.json", {"text_config__num_hidden_layers": 3}, r"missing language_model\.model\.layers\.2"),
        ("config.json", {"text_config__num_hidden_layers": 1}, r"unknown language_model\.model\.layers\.1"),
        (
            "config.json",
            {"text_config__vocab_size": 200},
            "the tokenizer has 271 tokens, the embedding only 200",
        ),
        ("config.json", {"text_config__hidden_size": "32"}, "hidden_size should be a whole number, not '32'"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 20}}, "become 16 or 20 pixels wide and high"),
        ("preprocessor_config.json", {"size": []}, r"size should be one or two numbers of pixels, not \[\]"),
        (
            "preprocessor_config.json",
            {"crop_size": {"width": {"a": 1}}},
            "crop_size should be one or two numbers",
        ),
        ("preprocessor_config.json", {"resample": 0}, "resample is 0; only 1 or 2 or 3"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, "image_mean should be three numbers"),
        ("preprocessor_config.json", {"image_mean": [0, 0, float("nan")]}, "image_mean: expected a finite"),
        ("preprocessor_config.json", {"image_std": [1, 1, float("inf")]}, "image_std: expected a finite"),
        ("preprocessor_config.json", {"image_mean": [0, 0, 1e300]}, r"_config\.json: a mean of \(0\.0, 0\.0"),
        ("preprocessor_config.json", {"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize is false; only true"),
        ("preprocessor_config.json", {"do_center_crop": False}, "shortest_edge without do_center_crop"),
        ("tokenizer_config.json", {"eos_token": None, "chat_template": "{{ x"}, "it is not Jinja"),
    ],
)
def test_wrong_values_are_named_by_file_and_key(
    folder: Path, file: str, values: dict[str, Any], message: str, change: Change
) -> None:
    change(folder / file, **values)
    with pytest.raises(InputError, match=message) as caught:
        open_hf(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_config_that_contradicts_the_shapes_of_weights(folder: Path, change: Change) -> None:
    change(folder / "config.json", text_config__intermediate_size=50)
    with pytest.raises(
        InputError, match=r"gate_proj\.weight in model-.*\) is \[48, 32\] instead of \[50, 32\]"
    ):
        open_model(folder)


def test_padding_to_a_square_is_read(folder: Path, change: Change) -> None:
    change(folder / "preprocessor_config.json", do_pad=True)
    image = open_hf(folder).config.image
    assert (image.mode, image.pad_color) == ("pad", (122, 116, 104))
    change(folder / "preprocessor_config.json", do_pad=None)
    assert open_hf(folder).notes == (
        "pictures are cropped, as preprocessor_config.json does not ask for do_pad",
    )


def test_newer_and_older_files_of_the_processor(folder: Path, change: Change) -> None:
    inner = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": inner | {"resample": 2}}))
    assert open_hf(folder).config.image.resample == "bilinear"
    (folder / "processor_config.json").unlink()
    change(folder / "preprocessor_config.json", size=16, crop_size=16)  # as in 2021
    assert open_hf(folder).config.image.mode == "crop"
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"preprocessor_config\.json is missing"):
        open_hf(folder)


def test_without_a_chat_template_the_usual_one_is_assumed_and_told(folder: Path, change: Change) -> None:
    change(folder / "tokenizer_config.json", chat_template=None)
    loaded = open_hf(folder)
    assert loaded.config.template == "v1"
    assert loaded.notes == ("no file says the chat format; v1 was assumed",)
    assert open_hf(folder, template="chatml").notes == ()


def test_ends_of_answers_come_from_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    assert open_hf(folder).config.stop_token_ids == (4, 5, 8)


def test_beams_of_generation_config_are_told(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"num_beams": 1, "early_stopping": true}')
    before = open_hf(folder).notes
    (folder / "generation_config.json").write_text('{"num_beams": 4, "early_stopping": true}')
    told = "generation_config.json asks for num_beams 4, which is not read; ask with num_beams yourself"
    assert open_hf(folder).notes == (told, *before)


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (Path("harm"),))


def test_pickled_code_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    for content in (pickle.dumps({"a": Harmful()}), b"no pickle"):
        (folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(InputError, match=r"pytorch_model\.bin is (refused|damaged)"):
            open_hf(folder)
    torch.save({"a": Harmful()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin is refused: .* code in it is never run"):
        open_hf(folder)
    assert not (folder / "harm").exists()
