"""Weights that are not finite end in one sentence that names them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pumice.assistant import Assistant, load
from pumice.conversation import Conversation, user_message
from pumice.engine.generate import naive_generate
from pumice.errors import WorkError
from pumice.formats.peft.read import add_update
from pumice.model.finite import finite_rows, why_not_finite
from pumice.storage.tensors import as_lazy

SAID = "not finite numbers, as its weights .* hold nan or inf"


def spoiled(source: Path, target: Path, name: str, value: float) -> Path:
    """A copy of a model folder with one value in the first tensor whose name begins with `name`."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    first = next(found for found in tensors if found.startswith(name))
    tensors[first].view(-1)[0] = value
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.fixture
def broken(tiny_folder: Path, tmp_path: Path) -> Assistant:
    folder = spoiled(tiny_folder, tmp_path / "broken", "connector.", torch.nan)
    return load(folder, device="cpu", quantize=None)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_an_answer_from_nan(broken: Assistant, tiny_folder: Path, temperature: float) -> None:
    picture = Image.new("RGB", (40, 30), "red")
    with pytest.raises(WorkError, match=SAID) as caught:
        broken.ask(picture, "What is it?", temperature=temperature, max_new_tokens=4)
    assert "connector." in str(caught.value)
    with pytest.raises(WorkError, match=SAID):
        broken.ask_many([(picture, "What is it?")], max_new_tokens=4)
    prompt = broken.prompt(Conversation((user_message("What is it?", [picture]),)))
    with pytest.raises(WorkError, match=SAID):
        naive_generate(broken.model, prompt)
    # What it computed is nowhere left: an answer without the picture is right.
    sound = load(tiny_folder, device="cpu", quantize=None)
    expected = sound.ask(None, "What is it?", max_new_tokens=4)
    assert broken.ask(None, "What is it?", max_new_tokens=4) == expected


def test_an_explanation_from_nan(broken: Assistant) -> None:
    picture = Image.new("RGB", (40, 30), "red")
    for answer in (None, "A dog."):
        with pytest.raises(WorkError, match=SAID):
            broken.explain(picture, "What is it?", answer)


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_matrix_of_the_decoder(tiny_folder: Path, tmp_path: Path, quantize: Any, value: float) -> None:
    folder = spoiled(tiny_folder, tmp_path / "broken", "decoder.blocks.0.mlp", value)
    with pytest.raises(WorkError, match="not finite"):
        load(folder, device="cpu", quantize=quantize).ask(None, "What is it?", max_new_tokens=4)


def test_a_scale_of_a_packed_matrix(tiny_folder: Path) -> None:
    """As a folder that was damaged on the disk has it: nothing else would notice."""
    assistant = load(tiny_folder, device="cpu", quantize="int8")
    layer = assistant.model.decoder.blocks[1].attention.k
    layer.data[16 * layer.in_features :].view(torch.float16)[0] = torch.nan
    with pytest.raises(WorkError, match=r"as its weights decoder\.blocks\.1\.attention\.k\.weight hold nan"):
        assistant.ask(None, "What is it?", max_new_tokens=4)


@pytest.mark.parametrize("spoiled", ["a", "b"])
def test_an_adapter_is_blamed_and_not_the_weight_under_it(spoiled: str) -> None:
    factors = {"a": torch.ones(1, 3), "b": torch.ones(2, 1)}
    factors[spoiled][0, 0] = torch.nan
    a, b = (as_lazy(factors[name], f"{name} in adapter.safetensors") for name in "ab")
    merged = add_update(as_lazy(torch.ones(2, 3), "q in base.gguf"), a, b, 1.0)
    with pytest.raises(WorkError, match=f"^{spoiled} in adapter.safetensors holds nan or inf"):
        merged.read()


def test_without_a_spoiled_weight_the_type_is_too_narrow(tiny_folder: Path) -> None:
    model = load(tiny_folder, device="cpu", quantize=None, dtype=torch.float16).model
    assert "float16 is too narrow for it; open it in float32 or bfloat16" in why_not_finite(model)


def test_which_rows_are_finite() -> None:
    rows = torch.tensor([[1.0, 2], [1, torch.nan], [torch.inf, -torch.inf], [3, torch.inf], [0, 0]])
    assert finite_rows(rows).tolist() == [True, False, False, False, True]
