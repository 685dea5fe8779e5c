"""Every format: what it refuses, what it leaves behind when it fails, and adapters on the way out."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pumice.cli import app
from pumice.config import ConnectorConfig, ModelConfig, RopeScaling, VisionConfig
from pumice.errors import InputError, WorkError
from pumice.formats.export import REFUSALS, export, merge_and_compare, probe, refusal
from pumice.formats.pumice.folder import save
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import as_lazy, open_weights

LLAVA = "CLIP + Llama, pad (LLaVA 1.5)"


@pytest.fixture(scope="module")
def llava(models: ModuleType) -> LoadedParts:
    return models.tiny(models.ARCHITECTURES[LLAVA])


@pytest.fixture(scope="module")
def adapted(models: ModuleType) -> LoadedParts:
    """With LoRA beside its weights, B drawn at random as if it were trained."""
    return models.tiny(models.ARCHITECTURES["CLIP + Llama, LoRA"])


def _image(**changes: Any) -> Callable[[ModelConfig], ModelConfig]:
    return lambda config: replace(config, image=replace(config.image, **changes))


def _decoder(**changes: Any) -> Callable[[ModelConfig], ModelConfig]:
    return lambda config: replace(config, decoder=replace(config.decoder, **changes))


def _wide_tower(config: ModelConfig) -> ModelConfig:
    return replace(config, vision=replace(config.vision, width=48))


TILES = {"mode": "anyres", "pinpoints": ((56, 112),)}
LLAMA_3 = RopeScaling("llama3", 8.0)


@pytest.mark.parametrize(
    ("change", "formats_that_refuse", "words"),
    [
        (lambda c: c, [], ""),
        (lambda c: replace(c, vision=VisionConfig()), ["hf", "llava", "gguf"], "EfficientNet"),
        (lambda c: replace(c, vision=VisionConfig(kind="none")), ["hf", "llava"], "language model alone"),
        (lambda c: replace(c, connector=ConnectorConfig("linear")), [], ""),
        (
            lambda c: replace(_wide_tower(c), connector=ConnectorConfig("linear")),
            ["hf", "gguf"],
            "LLM (64) is twice as wide as the tower (48)",
        ),
        (
            lambda c: replace(c, connector=ConnectorConfig("identity"), decoder=replace(c.decoder, width=32)),
            ["hf", "gguf"],
            "identity",
        ),
        (lambda c: replace(c, connector=ConnectorConfig("mlp3x_gelu")), ["hf", "gguf"], "mlp3x_gelu"),
        (
            lambda c: replace(c, connector=ConnectorConfig(reduce="pixel_shuffle", factor=2)),
            ["hf", "llava", "gguf"],
            "before it, which a LLaVA's files in GGUF do not hold",
        ),
        (lambda c: replace(c, image_wrap=("<im_start>", "<im_end>")), [], ""),
        (lambda c: replace(c, image_wrap=("[", "]")), ["llava"], "[ and ]"),
        (_image(pad_color=(0, 0, 0)), ["hf", "llava"], "(0, 0, 0)"),
        (_image(mode="squash"), ["llava"], "squashes"),
        (_image(**TILES), ["gguf"], "image_newline"),
        (_image(**TILES, unpad=False), ["hf", "gguf"], "image_newline"),
        (_image(**TILES, max_tiles=9), ["gguf"], "image_newline"),
        (lambda c: replace(c, vision=replace(c.vision, select="cls_patch")), ["gguf"], "class token"),
        (_decoder(qk_norm=True), ["llava"], "Qwen3"),
        (_decoder(qk_norm=True, qkv_bias=True), ["hf", "llava", "gguf"], "both biases"),
        (_decoder(qkv_bias=True, head_dim=8), ["hf", "llava"], "32"),
        (_decoder(qkv_bias=True, rope_scaling=LLAMA_3), ["gguf"], "rotary"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    llava: LoadedParts,
    change: Callable[[ModelConfig], ModelConfig],
    formats_that_refuse: list[str],
    words: str,
) -> None:
    config = change(llava.config)
    reasons = {to: REFUSALS[to](config) for to in ("hf", "llava", "gguf")}
    assert [to for to, reason in reasons.items() if reason] == formats_that_refuse, reasons
    assert not formats_that_refuse or any(words in str(reason) for reason in reasons.values()), reasons
    instead = next((to for to, reason in reasons.items() if not reason), None)
    remedy = f"; use --to {instead}" if instead else "; share the Pumice folder itself"
    assert all(str(refusal(to, config)).endswith(remedy) for to in formats_that_refuse)


def test_a_refusal_writes_nothing(llava: LoadedParts, tmp_path: Path) -> None:
    tiled = replace(llava, config=_image(**TILES)(llava.config))
    with pytest.raises(InputError, match=r"cannot be exported to gguf: .*image_newline.*use --to hf"):
        export(tiled, "gguf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "onnx"}, "no format 'onnx'.*hf, llava, gguf, ollama, peft"),
        ({"to": "hf", "dtype": "int8"}, "no type 'int8'.*fp16, bf16, fp32"),
        ({"to": "gguf", "kind": "q3"}, "no 'q3' among the options of GGUF; use one of f32, f16, bf16, q8_0"),
        ({"to": "gguf", "tower_kind": ""}, "no '' among the options of GGUF; use one of f32, f16"),
        ({"to": "gguf", "dtype": "fp16"}, "--dtype is not for gguf.*--type"),
        ({"to": "gguf", "dtype": "keep"}, "--dtype is not for gguf.*--type"),
        ({"to": "hf", "kind": "f16"}, "--type, .* not for hf; .* with --dtype"),
        ({"to": "llava", "class_token": "first"}, "--class-token are not for llava"),
        ({"to": "hf", "kind": "q8_0"}, "--type, .* not for hf; .* with --dtype"),
        ({"to": "llava", "tower_kind": "f32"}, "--mmproj-type .* not for llava"),
        ({"to": "hf", "tower": "openai/x"}, "--tower-name is not for hf"),
        ({"to": "peft"}, "no LoRA adapters; use --to hf"),
        # What no option mends is told before what is wrong with the options.
        ({"to": "peft", "kind": "f16"}, "no LoRA adapters; use --to hf"),
        ({"to": "peft", "drop_lora": True}, "no LoRA adapters; use --to hf"),
    ],
)
def test_wrong_arguments_write_nothing(
    llava: LoadedParts, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        export(llava, arguments.pop("to"), tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_options_that_adapters_do_not_take(adapted: LoadedParts, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--class-token are not for peft"):
        export(adapted, "peft", tmp_path / "out", class_token="shifted")
    with pytest.raises(InputError, match="--drop-lora is not for peft"):
        export(adapted, "peft", tmp_path / "out", drop_lora=True)
    assert list(tmp_path.iterdir()) == []


def test_a_target_with_files_is_left_alone(llava: LoadedParts, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        export(llava, "hf", tmp_path)
    with pytest.raises(InputError, match="exists already"):
        export(llava, "hf", tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    export(llava, "hf", tmp_path / "empty")


@pytest.mark.parametrize("to", ["hf", "llava", "gguf", "peft"])
def test_a_full_disk_leaves_nothing_behind(
    adapted: LoadedParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    """The last file fails after others were written."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    import gguf

    from pumice.formats.hf import write as hf_write
    from pumice.formats.llava import write as llava_write
    from pumice.formats.peft import write as peft_write

    for module in (hf_write, llava_write, peft_write):
        monkeypatch.setattr(module, "write_json", full)
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(WorkError, match=r"cannot write .*No space left on device"):
        export(adapted, to, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_seen_before_anything_is_written(
    llava: LoadedParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: (100, 99, 1))
    with pytest.raises(InputError, match="MB are free"):
        export(llava, "hf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_merged_adapters_give_the_same_logits(adapted: LoadedParts) -> None:
    config, state = merge_and_compare(adapted.config, adapted.state)
    assert config.lora is None
    assert not any("lora" in name for name in state)
    with_adapters, without = probe(adapted.config, adapted.state), probe(config, state)
    plain = {name: tensor for name, tensor in adapted.state.items() if "lora" not in name}
    dropped = probe(config, plain)
    # worst case measured: 3.5e-5 of logits up to 10
    assert (with_adapters - without).abs().max() < 1e-4
    assert (with_adapters - dropped).abs().max() > 1, "the adapters do nothing, so this test could not fail"


def test_adapters_that_do_not_survive_merging_are_refused(adapted: LoadedParts) -> None:
    """Float16 holds the weights and the adapters, but not their sum."""
    name = "decoder.blocks.0.attention.q.lora_b"
    state = {name: as_lazy(tensor.read().half()) for name, tensor in adapted.state.items()}
    state[name] = as_lazy(torch.full_like(state[name].read(), 6e4))
    with pytest.raises(InputError, match=r"move the logits by nan%.* --to peft"):
        merge_and_compare(adapted.config, state)


def test_weights_are_stored_as_they_were_or_as_asked(llava: LoadedParts, tmp_path: Path) -> None:
    half = {name: as_lazy(tensor.read(torch.bfloat16)) for name, tensor in llava.state.items()}
    export(replace(llava, state=half), "hf", tmp_path / "kept")
    export(llava, "hf", tmp_path / "cast", dtype="fp16")
    for folder, dtype in (("kept", torch.bfloat16), ("cast", torch.float16)):
        state = open_weights(tmp_path / folder)
        assert {tensor.dtype for tensor in state.values()} == {dtype}
        stored_dtype = json.loads((tmp_path / folder / "config.json").read_text())["torch_dtype"]
        assert f"torch.{stored_dtype}" == str(dtype)


def test_a_form_of_boxes_that_no_file_names_is_told(llava: LoadedParts, tmp_path: Path) -> None:
    for form, told in (("padded", False), ("qwen", True)):
        model = replace(llava, config=replace(llava.config, boxes=form))
        notes = export(model, "hf", tmp_path / form).notes
        assert (
            any("its files do not say that this model writes boxes in the form qwen" in n for n in notes)
            == told
        )


def test_command(llava: LoadedParts, tmp_path: Path) -> None:
    state = {name: tensor.read() for name, tensor in llava.state.items()}
    save(tmp_path / "model", llava.config, state, tokenizer=llava.tokenizer.to_str())
    arguments = ["export", str(tmp_path / "model"), "--to", "gguf", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["files"] == ["mmproj-f16.gguf", "model-f16.gguf"]
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2
    assert "exists already" in again.stderr
