"""Ways to load a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from questions import SHORT

import pumice
from pumice import InputError
from pumice.assistant import Assistant, load
from pumice.kernels import compute
from pumice.model.quantized import PackedEmbedding


def test_int8_is_close(exact: Assistant, tiny_folder: Path, pictures: list[Path]) -> None:
    int8 = load(tiny_folder, device="cpu", quantize="int8")
    assert int8.model.dtype == torch.float32
    assert isinstance(int8.model.decoder.embed, PackedEmbedding)
    actual, expected = (a.logits(pictures[0], "What?") for a in (int8, exact))
    away = ((actual - expected).abs().mean() / expected.std()).item()
    assert away < 0.04  # measured: 3.0e-2, of which 0.8e-2 by weights
    assert int8.ask(pictures[0], "What?", **SHORT)


def test_without_compiled_code_auto_stays_in_fp32(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "library", lambda: None)
    assistant = load(tiny_folder, device="cpu")
    assert assistant.model.dtype == torch.float32
    assert not isinstance(assistant.model.decoder.embed, PackedEmbedding)
    assert load(tiny_folder, device="cpu", quantize="int8").ask(None, "What?", **SHORT)


def test_load_is_reached_from_the_package(tiny_folder: Path) -> None:
    assert pumice.load(str(tiny_folder), device="cpu").ask(None, "Hi?", **SHORT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "pumice-huge"}, "'pumice-huge'"),
        ({"device": "abacus"}, "device 'abacus' is not available"),
        ({"quantize": "int3"}, "quantize is 'int3'"),
    ],
)
def test_wrong_arguments_of_load(tiny_folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(**{"name": tiny_folder, **arguments})
