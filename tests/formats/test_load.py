"""Which folder a model's name means, and in which types a model is opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pumice.errors import InputError
from pumice.formats import read
from pumice.formats.import_ import import_model
from pumice.formats.load import open_model
from pumice.formats.pumice.folder import save
from pumice.formats.read import BUILT_IN, find_model, is_built_in, read_model, stored_generation
from pumice.formats.sizes import weight_sizes
from pumice.kernels import loader
from pumice.model import quantized_vision, vision
from pumice.storage import tensors
from pumice.storage.tensors import open_file


def test_how_answers_of_a_model_on_the_hub_are_sampled_is_not_known_before_it_is_read(
    searching: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stored_generation(searching) == {"num_beams": 3, "length_penalty": 0.5}
    monkeypatch.setattr(read, "find_model", None)  # which would fetch it
    assert stored_generation("owner/model") is None
    assert stored_generation("owner/model/model.gguf") is None


def test_a_folder_without_a_model_does_not_hide_a_built_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pumice-tiny"
    folder.mkdir()  # as recipes/pumice-tiny is
    assert find_model("pumice-tiny") == BUILT_IN / "pumice-tiny"
    assert is_built_in("pumice-tiny") and not is_built_in("owner/model")
    (folder / "config.json").write_text("{}")
    assert find_model("pumice-tiny") == Path("pumice-tiny")
    assert not is_built_in("pumice-tiny")


def test_a_folder_that_is_no_model_and_a_name_that_is_nothing(tmp_path: Path) -> None:
    assert find_model(tmp_path) == tmp_path  # opening it says what it lacks
    with pytest.raises(InputError, match=r"no model 'nothing'.*pumice-tiny"):
        find_model("nothing")


@pytest.mark.parametrize(
    "missing", ["runs/mine/model", "./mine/model", "/nowhere/model", "~/nowhere", "pumice-tinny"]
)
def test_what_is_no_model_names_the_models_that_are_there(missing: str) -> None:
    with pytest.raises(InputError, match=r"there is no model .*, or one of: pumice-tiny$"):
        find_model(missing)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_tower_kept_as_stored_sees_the_same(
    llava: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16: bool
) -> None:
    """Where the processor multiplies bfloat16, up to its rounding."""
    monkeypatch.setattr(vision, "multiplies_bf16", lambda: bf16)
    import_model(str(llava("llava")), tmp_path / "half", dtype="fp16")
    widened = open_model(tmp_path / "half", merge=False).model
    half_model = open_model(tmp_path / "half").model
    size = half_model.config.vision.image_size
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        seen, expected = half_model.encode(pixels), widened.encode(pixels)
    change = ((seen - expected).norm() / expected.norm()).item()
    # Measured: 2.3e-3
    assert 0 < change < 1e-2 if bf16 else change == 0
    assert torch.equal(half_model.encode(pixels), expected)  # gradients are possible, so nothing is rounded
    types = {parameter.dtype for parameter in widened.parameters()}
    assert types == {torch.float32}
    half = [name for name, parameter in half_model.named_parameters() if parameter.dtype == torch.float16]
    assert half
    assert all(name.startswith("tower.") and name.endswith(".weight") for name in half)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("name", ["CLIP + Llama, pad (LLaVA 1.5)", "SigLIP, split (SmolVLM)"])
def test_a_tower_opened_with_few_bits(
    quantize: str, name: str, models: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same from a folder that is quantised; its memory is known before."""
    if loader.compiled("packed")[0] is None:
        pytest.skip(loader.compiled("packed")[1])
    monkeypatch.setattr(quantized_vision, "multiplies_fast", lambda: True)
    monkeypatch.setattr(quantized_vision, "multiplies_tiles", lambda: False)
    source = tmp_path / "whole"
    parts = models.tiny(models.ARCHITECTURES[name])
    save(source, parts.config, parts.state, tokenizer=parts.tokenizer.to_str())
    import_model(str(source), tmp_path / "few", quantize=quantize)
    size = parts.config.vision.image_size
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    tokens = []
    for folder in (source, tmp_path / "few"):
        model = open_model(folder, quantize=quantize).model
        held = sum(tensor.nbytes for tensor in (*model.tower.parameters(), *model.tower.buffers()))
        planned = weight_sizes(read_model(folder), quantize, torch.device("cpu"), torch.float32)
        assert planned["tower"] == held
        with torch.inference_mode():
            tokens.append(model.tower(pixels))
    assert torch.equal(*tokens)
    with torch.inference_mode():
        expected = open_model(source).model.tower(pixels)
    # Measured: 1.03e-2 (SigLIP)
    assert 0 < ((tokens[0] - expected).norm() / expected.norm()).item() < 2e-2
    # Where the processor has no such instruction, it stays as it is.
    monkeypatch.setattr(quantized_vision, "multiplies_fast", lambda: False)
    with torch.inference_mode():
        assert torch.equal(open_model(source, quantize=quantize).model.tower(pixels), expected)


@pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="Linux alone says which pages are in memory"
)
@pytest.mark.parametrize("stored", ["safetensors", "bin"])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_pages_of_what_is_converted_are_given_back(
    stored: str, quantize: str | None, models: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file stays mapped for the tower's other weights, which keep their type."""
    if quantize and loader.compiled("packed")[0] is None:
        pytest.skip(loader.compiled("packed")[1])
    monkeypatch.setattr(quantized_vision, "multiplies_fast", lambda: True)
    monkeypatch.setattr(quantized_vision, "multiplies_tiles", lambda: False)
    tiny = models.ARCHITECTURES["CLIP + Llama, pad (LLaVA 1.5)"]
    wide = {part: replace(getattr(tiny.config, part), mlp_width=1 << 14) for part in ("vision", "decoder")}
    parts = models.tiny(replace(tiny, config=replace(tiny.config, **wide)))
    state = {name: tensor.cast(torch.float16) for name, tensor in parts.state.items()}
    save(tmp_path, parts.config, state, tokenizer=parts.tokenizer.to_str())
    file = tmp_path / "model.safetensors"
    if stored == "bin":
        torch.save({name: tensor.read() for name, tensor in open_file(file).items()}, tmp_path / "model.bin")
        file.unlink()
    model = open_model(tmp_path, quantize=quantize).model
    kept = sum(tensor.nbytes for tensor in model.parameters() if tensor.dtype == torch.float16)
    assert kept > 0
    assert resident(tmp_path) < kept + 1e6  # and pages around; 13 to 19 MB are converted


def test_a_bin_that_cannot_be_mapped_is_read_once(
    models: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = models.tiny(models.ARCHITECTURES["CLIP + Llama, pad (LLaVA 1.5)"])
    state = {name: tensor.cast(torch.float16) for name, tensor in parts.state.items()}
    save(tmp_path, parts.config, state, tokenizer=parts.tokenizer.to_str())
    stored = {name: tensor.read() for name, tensor in open_file(tmp_path / "model.safetensors").items()}
    torch.save(stored, tmp_path / "model.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "model.safetensors").unlink()
    opened: list[Path] = []
    plain = tensors._Bin._open

    def noted(self: tensors._Bin) -> Any:
        opened.append(self.path)
        return plain(self)

    monkeypatch.setattr(tensors._Bin, "_open", noted)
    monkeypatch.setattr("pumice.formats.load.MAPPED_BYTES", 1)
    open_model(tmp_path)
    assert opened == [tmp_path / "model.bin"]


def resident(folder: Path) -> int:
    """Bytes in memory of the files of a folder that this process has mapped."""
    size, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith("Rss:"):
            size += counts * int(line.split()[1]) * 1024
        elif "-" in line.split(" ")[0]:
            counts = str(folder) in line
    return size
