"""Pairs of GGUF files, of Pumice and in the layouts of llama.cpp's scripts, are read back as the model."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pumice
from pumice.config import ConnectorConfig, ImagePolicy, VisionConfig
from pumice.errors import InputError
from pumice.files import folder_size
from pumice.formats import sizes
from pumice.formats.export import export
from pumice.formats.gguf.file import GgufFile
from pumice.formats.gguf.mmproj import _own
from pumice.formats.load import open_model
from pumice.formats.pumice.quantized import ABANDONED, copies_folder
from pumice.formats.read import read_model
from pumice.storage.json_file import Keys
from pumice.storage.parts import LoadedParts

SEEING = [
    "LLaVA 1.5", "LLaVA 1.0", "Mistral, pad", "Llama 3", "SigLIP + Qwen2", "Qwen3", "SigLIP + SmolLM2", "LoRA"
]  # fmt: skip
# Our names -> those in an mmproj. The script of 2023 and 2024 swaps the halves of the MLP.
ENDS = {
    "tower.class_token": "v.class_embd", "tower.patch.weight": "v.patch_embd.weight",
    "tower.patch.bias": "v.patch_embd.bias", "tower.positions": "v.position_embd.weight",
    "tower.pre_norm.weight": "v.pre_ln.weight", "tower.pre_norm.bias": "v.pre_ln.bias",
}  # fmt: skip
LAYERS = {
    "attention_norm": "ln1", "attention.q": "attn_q", "attention.k": "attn_k", "attention.v": "attn_v",
    "attention.o": "attn_out", "mlp_norm": "ln2", "mlp.up": "ffn_up", "mlp.down": "ffn_down",
}  # fmt: skip
SWAPPED = {"mlp.up": "ffn_down", "mlp.down": "ffn_up"}


def tiny(models: ModuleType, part: str, **changes: Any) -> LoadedParts:
    [name] = [name for name in models.ARCHITECTURES if part in name]
    architecture = models.ARCHITECTURES[name]
    config = replace(architecture.config, **changes)
    # GGUF cannot say that only the very first word has a space before it.
    tokenizer = models.sentencepiece if "1.6" in part else architecture.tokenizer
    return models.tiny(models.Architecture(config, tokenizer))


def mmproj_name(name: str, old: bool) -> str:
    if name == "image_newline":
        return "model.image_newline" if old else "v.image_newline"
    if name.startswith("connector."):
        return name.replace("connector.layers", "mm")
    if not name.startswith("tower.blocks."):
        return ENDS[name]
    _, _, number, rest = name.split(".", 3)
    layer, _, part = rest.rpartition(".")
    return f"v.blk.{number}.{(LAYERS | SWAPPED if old else LAYERS)[layer]}.{part}"


def write_mmproj(
    path: Path, model: LoadedParts, *, old: bool = False, extra: dict[str, Tensor] | None = None,
    **changes: Any,
) -> Path:  # fmt: skip
    """As llama.cpp's programs write a LLaVA: matrices in fp16, old ones without the last block.

    changes: other values of keys, of which `__` stands for a dot; None: no such key. extra: more tensors.
    """
    import gguf

    vision, image, running = model.config.vision, model.config.image, model.config.vision.depth - 1
    metadata: dict[str, Any] = {
        "clip.has_vision_encoder": True, "clip.projector_type": "mlp",
        "clip.use_gelu": not old and vision.activation != "quick_gelu",
        "clip.vision.image_size": vision.image_size, "clip.vision.patch_size": vision.stride,
        "clip.vision.embedding_length": vision.width, "clip.vision.feed_forward_length": vision.mlp_width,
        "clip.vision.projection_dim": 768, "clip.vision.attention.head_count": vision.heads,
        "clip.vision.attention.layer_norm_epsilon": vision.norm_eps,
        "clip.vision.block_count": running if old else vision.depth,
        "clip.vision.image_mean": list(image.mean), "clip.vision.image_std": list(image.std),
    }  # fmt: skip
    metadata |= (
        {"clip.has_llava_projector": True, "clip.has_text_encoder": False}
        if old
        else {"clip.vision.feature_layer": [vision.depth + 1 + vision.layer]}
    )
    if image.pinpoints:
        metadata["clip.vision.image_grid_pinpoints"] = [side for pair in image.pinpoints for side in pair]
        metadata["clip.vision.mm_patch_merge_type"] = "spatial_unpad"
    metadata |= {key.replace("__", "."): value for key, value in changes.items()}
    left_out = ("decoder.", "tower.post_norm.", *([f"tower.blocks.{running}."] if old else []))
    tensors = {
        mmproj_name(name, old): tensor.read().squeeze()
        for name, tensor in model.state.items()
        if not name.startswith(left_out)
    }
    writer = gguf.GGUFWriter(path, "clip")
    for key, value in metadata.items():
        add: Any = {
            bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
            list: writer.add_array, type(None): lambda key, value: None,
        }[type(value)]  # fmt: skip
        add(key, value)
    for name, tensor in (tensors | (extra or {})).items():
        half = tensor.dim() == 4 or (tensor.dim() == 2 and name.endswith("weight"))
        dtype = np.float16 if half else np.float32
        writer.add_tensor(name, tensor.numpy().astype(dtype if tensor.is_floating_point() else np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_llm(folder: Path, model: LoadedParts, kind: str = "f32") -> Path:
    """The language model alone, as a GGUF file."""
    vision = VisionConfig(kind="none", width=model.config.decoder.width)
    config = replace(model.config, vision=vision, connector=ConnectorConfig("identity"), image=ImagePolicy())
    state = {name: tensor for name, tensor in model.state.items() if name.startswith("decoder.")}
    export(replace(model, config=config, state=state), "gguf", folder, kind=kind)
    return folder / f"model-{kind}.gguf"


def same_answers(models: ModuleType, model: LoadedParts, back: LoadedParts, worst: float) -> None:
    """Logits of a picture and a question, and the tokenizer's ids with them."""
    picture = models.picture(100, 60)
    expected, actual = (models.assistant(parts).logits(picture, "What is this?") for parts in (model, back))
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() < worst


@pytest.mark.parametrize("part", SEEING)
def test_what_pumice_wrote_is_read_back(models: ModuleType, tmp_path: Path, part: str) -> None:
    """Everything but the tower's final norm, which is never computed, and what llama.cpp has no place for."""
    model = tiny(models, part)
    export(model, "gguf", tmp_path / "out", kind="f32")
    back = read_model(tmp_path / "out")
    decoder = replace(back.config.decoder, sliding_window=model.config.decoder.sliding_window)
    decoder = replace(decoder, context=model.config.decoder.context)
    expected = replace(model.config, lora=None, trained_pictures=None, decoder=decoder)
    if model.config.connector.kind == "linear":  # which is written as the MLP that computes the same
        expected = replace(expected, connector=back.config.connector)
    assert replace(back.config, decoder=decoder) == expected
    for name, tensor in model.state.items():
        if not name.startswith(("tower.post_norm", "connector.")) and model.config.lora is None:
            assert torch.equal(back.state[name].read(), tensor.read()), name
    same_answers(models, model, back, 1e-3)


def near(back: LoadedParts, model: LoadedParts) -> None:
    """Every tensor that is computed with is the model's, but for fp16's rounding."""
    for name, tensor in back.state.items():
        if not name.startswith("tower.post_norm"):
            original = model.state[name].read()
            assert (tensor.read() - original).abs().max() <= 2**-11 * original.abs().max(), name


@pytest.mark.parametrize("part", ["LLaVA 1.5", "SigLIP + Qwen2", "LLaVA 1.6"])
@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("mlp_width", [64, 32])
def test_pairs_of_llama_cpps_programs(
    models: ModuleType, tmp_path: Path, part: str, old: bool, mlp_width: int
) -> None:
    """Old: no feature layer, one block fewer, the MLP's halves swapped, a SigLIP's GELU called quick.

    Where the MLP is as wide as the tower, sizes do not tell that its halves are swapped.
    """
    vision = replace(tiny(models, part).config.vision, mlp_width=mlp_width)
    model = tiny(models, part, vision=vision)
    llm = write_llm(tmp_path / "llm", model)
    back = read_model(llm, mmproj=write_mmproj(tmp_path / "mmproj.gguf", model, old=old))
    if old:
        assert back.config.vision == replace(vision, depth=2, layer=-1)
        assert any("all of its 2 blocks are run" in note for note in back.notes)
    else:
        assert back.config.vision == vision
    near(back, model)
    image = model.config.image
    if image.mode != "squash":  # which no key says
        for name in ("mean", "std"):
            assert getattr(back.config.image, name) == pytest.approx(getattr(model.config.image, name))
        assert replace(back.config.image, mean=image.mean, std=image.std) == image
    back = replace(back, config=replace(back.config, image=image))
    same_answers(models, model, back, 0.05)


@pytest.fixture
def pair(models: ModuleType, tmp_path: Path) -> Path:
    export(tiny(models, "SigLIP + Qwen2"), "gguf", tmp_path / "pair", kind="q8_0")
    return tmp_path / "pair"


def test_a_pair_answers(models: ModuleType, pair: Path) -> None:
    model = read_model(pair)
    answer = pumice.load(pair, device="cpu", quantize=None).ask(
        models.picture(56, 56), "What?", max_new_tokens=4
    )
    assert answer == models.assistant(model).ask(models.picture(56, 56), "What?", max_new_tokens=4) != ""


def test_one_linear_layer(models: ModuleType, tmp_path: Path) -> None:
    model = tiny(models, "LLaVA 1.5", connector=ConnectorConfig("linear"))
    back = read_model(
        write_llm(tmp_path / "llm", model), mmproj=write_mmproj(tmp_path / "mmproj.gguf", model, old=True)
    )
    assert back.config.connector.kind == "linear"
    assert any("llama.cpp computes a GELU behind it" in note for note in back.notes)
    same_answers(models, model, back, 0.1)


def test_what_a_file_does_not_say_is_told(models: ModuleType, tmp_path: Path) -> None:
    model = tiny(models, "LLaVA 1.6")
    without: dict[str, Any] = {
        "clip__vision__image_grid_pinpoints": None,
        "clip__vision__feature_layer": None,
    }
    llm = write_llm(tmp_path / "llm", model)
    untold = rewrite(llm, tmp_path / "untold.gguf", without="tokenizer.chat_template")
    back = read_model(untold, mmproj=write_mmproj(tmp_path / "mmproj.gguf", model, **without))
    assert back.config.template == "v1"
    assert "no file says the chat format; v1 was assumed" in back.notes
    assert "--template names another" in back.notes
    assert any("holds an image_newline" in note for note in back.notes)
    assert any("before the last of its 3 blocks" in note for note in back.notes)
    assert (back.config.image.mode, back.config.vision.layer) == ("pad", -2)
    chosen = read_model(untold, mmproj=tmp_path / "mmproj.gguf", template="mistral_instruct")
    assert chosen.config.template == "mistral_instruct"


def rewrite(source: Path, target: Path, without: str = "", **changes: Any) -> Path:
    """Write the file again without one key and with other values of text keys, by the gguf library."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")) and field.name != without:
            kind, inner = field.types[0], field.types[1] if len(field.types) > 1 else None
            value = changes.get(field.name.replace(".", "__"), field.contents())
            writer.add_key_value(field.name, value, kind, inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize("positions", [torch.arange(16), torch.arange(16.0)[None]])
def test_numbers_of_positions_are_left_out(models: ModuleType, tmp_path: Path, positions: Tensor) -> None:
    model = tiny(models, "SigLIP + SmolLM2")
    extra = {"v.position_ids": positions, "v.head.probe": torch.ones(3)}
    mmproj = write_mmproj(tmp_path / "mmproj.gguf", model, extra=extra)
    back = read_model(write_llm(tmp_path / "llm", model), mmproj=mmproj)
    assert back.state.keys() == model.state.keys()


@pytest.mark.parametrize(
    ("changes", "extra", "message"),
    [
        ({"clip__projector_type": "ldp"}, {}, "its projector is 'ldp'; only mlp"),
        ({"clip__projector_type": "mlp_norm"}, {}, "mlp_norm, Yi-VL's, .*; ask it in llama.cpp"),
        ({}, {"mm.3.weight": torch.ones(2, 2)}, "its projector is mlp_norm, Yi-VL's"),
        ({}, {"v.post_ln.weight": torch.ones(32)}, "a norm behind the tower that no LLaVA has"),
        ({}, {"v.extra": torch.ones(1)}, r"unknown v\.extra"),
        ({}, {"v.position_ids": torch.ones(16)}, r"v\.position_ids in mmproj\.gguf is not .* 16 positions"),
        ({}, {"v.embd.position_ids": torch.arange(15)}, "it holds 15 values, not 16"),
        (
            {},
            {"v.blk.0.ln1.weight": torch.ones(32).int()},
            r"ln1\.weight in .* whole numbers \(int32\), no w",
        ),
        ({"clip__vision__feature_layer": [1, 2]}, {}, "those of 2 layers; one can be read"),
        ({"clip__vision__feature_layer": [9]}, {}, "its feature layer is 9, but it has 3 blocks"),
        ({"clip__vision__block_count": 2**30}, {}, "depth must be 1000 or less, not 1073741824"),
        ({"clip__vision__block_count": 4}, {}, r"missing v\.blk\.3\.ln1\.weight"),
        ({"clip__vision__image_size": None}, {}, r"lacks the key 'clip\.vision\.image_size'"),
        ({"clip__vision__image_mean": [0.5]}, {}, "image_mean and image_std need 3 numbers"),
        ({"pumice__vision": "{"}, {}, r"pumice\.vision is not JSON"),
        ({"pumice__vision": 7}, {}, r"pumice\.vision should be text, not 7"),
        ({"pumice__vision": '{"class_token": "x"}'}, {}, "class_token is 'x'; known are first, shifted"),
    ],
)
def test_an_mmproj_that_is_no_llavas(
    models: ModuleType, tmp_path: Path, changes: dict[str, Any], extra: dict[str, Tensor], message: str
) -> None:
    model = tiny(models, "SigLIP + SmolLM2")
    mmproj = write_mmproj(tmp_path / "mmproj.gguf", model, extra=extra, **changes)
    with pytest.raises(InputError, match=message) as caught:
        read_model(write_llm(tmp_path / "llm", model), mmproj=mmproj)
    assert str(mmproj) in str(caught.value)


def test_files_that_do_not_belong_together(models: ModuleType, tmp_path: Path, pair: Path) -> None:
    model = tiny(models, "SigLIP + Qwen2")
    llm, mmproj = pair / "model-q8_0.gguf", pair / "mmproj-f16.gguf"
    with pytest.raises(InputError, match=r"is an mmproj, the half of a model that sees.*--mmproj"):
        read_model(mmproj)
    with pytest.raises(InputError, match=r"is no mmproj: its general\.architecture is 'qwen2', not 'clip'"):
        read_model(llm, mmproj=llm)
    shutil.copy(mmproj, pair / "mmproj-other.gguf")
    with pytest.raises(InputError, match=r"holds 2 mmproj files; name one of them with --mmproj: mmproj-f16"):
        read_model(pair)
    assert read_model(pair, mmproj=mmproj).config.vision.kind == "siglip"
    shutil.copy(llm, pair / "model-other.gguf")
    with pytest.raises(InputError, match=r"holds 2 language models; name one of them with --model: model-o"):
        read_model(pair, mmproj=mmproj)
    wide = tiny(models, "SigLIP + Qwen2", decoder=replace(model.config.decoder, width=96))
    with pytest.raises(InputError, match=r"features of width 64, .* takes 96: they are of two models"):
        read_model(write_llm(tmp_path / "wide", wide), mmproj=mmproj)
    with pytest.raises(InputError, match="is a Pumice model, which takes no mmproj; leave --mmproj out"):
        read_model("pumice-tiny", mmproj=mmproj)
    with pytest.raises(InputError, match=r"--mmproj none\.gguf is not there; check the path"):
        read_model(llm, mmproj="none.gguf")
    with pytest.raises(InputError, match="ask it without pictures, or give the mmproj file"):
        pumice.load(llm, device="cpu", quantize=None).ask(models.picture(56, 56), "What?")


def test_damaged_halves(pair: Path, tmp_path: Path) -> None:
    llm, mmproj = (pair / name for name in ("model-q8_0.gguf", "mmproj-f16.gguf"))
    data = mmproj.read_bytes()
    for damaged in (data[:-100], data[:500], data[:8] + b"\xff" * 16 + data[24:]):
        (tmp_path / "m.gguf").write_bytes(damaged)
        with pytest.raises(InputError, match=r"m\.gguf is damaged or cut short; fetch it again"):
            read_model(llm, mmproj=tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "value", ["", "[", "[" * 100_000, "[]", '{"image_wrap": 7}', '{"image_wrap": ["a"]}']
)
def test_a_damaged_value_of_our_own_key(value: str) -> None:
    with pytest.raises(InputError, match=r"m\.gguf: pumice\.vision"):
        _own(Keys({"pumice.vision": value}, "m.gguf"))


def test_a_file_of_k_quants_that_was_cut_short(tmp_path: Path) -> None:
    import gguf

    kind = gguf.GGMLQuantizationType.Q6_K
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", np.zeros((4, 210), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = (tmp_path / "m.gguf").read_bytes()
    end = GgufFile(tmp_path / "m.gguf").infos["x"].offset + 4 * 210
    (tmp_path / "m.gguf").write_bytes(data[: end - 1])
    with pytest.raises(InputError, match="damaged or cut short"):
        GgufFile(tmp_path / "m.gguf")


def test_a_pair_on_the_hub(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its type; what else lies in the client's cache is not taken."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--owner--tiny-GGUF"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    for name, source in {
        "tiny-Q8_0.gguf": "model-q8_0", "tiny-IQ8_0.gguf": "model-q8_0",
        "tiny-mmproj-bf16.gguf": "model-q8_0", "tiny-mmproj-f16.gguf": "mmproj-f16",
    }.items():  # fmt: skip
        shutil.copy(pair / f"{source}.gguf", snapshot / name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert read_model("owner/tiny-GGUF:Q8_0").config == read_model("owner/tiny-GGUF:q8_0").config
    model = read_model("owner/tiny-GGUF:q8_0")
    assert model.config.vision.kind == "siglip"
    assert model.sources["model"] == ("owner/tiny-GGUF:q8_0", snapshot / "tiny-Q8_0.gguf")
    with pytest.raises(InputError, match=r"should have one GGUF file of type Q4_K_M, and has none; name it"):
        read_model("owner/tiny-GGUF:Q4_K_M")


def converted(pair: Path, **options: Any) -> list[Path]:
    """Open the pair; return the copies that the cache holds then."""
    open_model(pair, quantize="int8", **options)
    return sorted(copies_folder().iterdir()) if copies_folder().exists() else []


def test_a_file_is_converted_once(
    models: ModuleType, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path / "cache"))
    [copy] = converted(pair)
    assert f"{pair} is converted once, from 0.00 to 0.00 GB in {copy}" in caplog.text
    written = (copy / "quantized.safetensors").stat().st_mtime_ns
    caplog.clear()
    assert converted(pair) == [copy]
    assert (copy / "quantized.safetensors").stat().st_mtime_ns == written
    assert "converted" not in caplog.text
    # Another file, though it has the name of the first, gets a copy of its own.
    shutil.rmtree(pair)
    export(models.tiny(models.ARCHITECTURES["SigLIP + Qwen2, squash"], seed=1), "gguf", pair, kind="q8_0")
    assert len(converted(pair)) == 2


def test_what_does_not_fit_another_device_is_refused_before_it_is_converted(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sizes, "free_on", lambda _: 0.0)
    with pytest.raises(InputError, match=r"in int8 needs .* of memory are free"):
        converted(pair, device="meta")
    assert not copies_folder().exists()


def test_what_a_killed_process_left_in_the_cache_is_removed(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path / "cache"))
    [copy] = converted(pair)
    killed, at_work = (copies_folder() / name for name in (".new-killed", ".new-at-work"))
    for scratch in (killed, at_work):
        scratch.mkdir()
        (scratch / "quantized.safetensors").write_bytes(bytes(100))
    long_ago = time.time() - 2 * ABANDONED
    os.utime(killed, (long_ago, long_ago))
    assert converted(pair) == sorted((at_work, copy))


def test_the_cache_is_bounded(
    models: ModuleType, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path / "cache"))
    [first] = converted(pair)
    with monkeypatch.context() as full_disk:
        full_disk.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        assert converted(pair) == [first]  # a copy that is there needs no more room
    size = folder_size(first)
    other = tmp_path / "other"
    export(models.tiny(models.ARCHITECTURES["SigLIP + Qwen2, squash"], seed=1), "gguf", other, kind="q8_0")
    [second] = converted(other, cache_limit=1.5 * size / 1e9)
    assert second != first  # the one that was not used for longest is gone
    assert converted(pair, cache_limit=0.1 * size / 1e9) == []  # neither it nor those of others fit
    monkeypatch.setenv("PUMICE_CACHE_LIMIT", "0")
    assert converted(pair, cache_limit=20) == [first]
    assert converted(pair) == []  # also its own copy of before
    assert "is converted at every start: its copy would take" in caplog.text
    monkeypatch.setenv("PUMICE_CACHE_LIMIT", "many")
    with pytest.raises(InputError, match="PUMICE_CACHE_LIMIT is 'many'; give a number of GB, 0 or more"):
        converted(pair)
