"""What a model takes in memory is known before it is read, and what does not fit is refused then."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from pumice import InputError
from pumice.formats import sizes
from pumice.formats.load import open_model
from pumice.formats.read import read_model
from pumice.formats.sizes import check_memory, least_memory, weight_sizes
from pumice.storage.tensors import LazyTensor

CPU = torch.device("cpu")


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_sizes_are_those_of_the_opened_model(quantize: str | None, tiny_folder: Path) -> None:
    loaded = read_model(tiny_folder)
    expected = weight_sizes(loaded, quantize, CPU, torch.float32)
    model = open_model(tiny_folder, quantize=quantize).model
    for name, part in (("tower", model.tower), ("language model", model.decoder)):
        held = {tensor.data_ptr(): tensor.nbytes for tensor in (*part.parameters(), *part.buffers())}
        assert expected[name] == pytest.approx(sum(held.values()), rel=0.01)


def test_what_cannot_fit_is_refused_before_it_is_read(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = read_model(tiny_folder)

    def never(dtype: torch.dtype) -> torch.Tensor:
        raise AssertionError("a tensor is read")

    state = {name: dataclasses.replace(tensor, loader=never) for name, tensor in loaded.state.items()}
    assert all(isinstance(tensor, LazyTensor) for tensor in state.values())
    loaded = dataclasses.replace(loaded, state=state)
    needed = {kind: least_memory(loaded, kind, CPU, torch.float32) for kind in (None, "int8", "int4")}
    assert needed[None] > needed["int8"] > needed["int4"]
    # 1. Fewer bits would fit: they are named.
    monkeypatch.setattr(sizes, "free_on", lambda _: needed["int8"])
    check_memory(loaded, "m", "int8", CPU, torch.float32)
    message = (
        r"'m' without quantisation needs .* GB of memory are free; use --quantize int8, .* or --quantize int4"
    )
    with pytest.raises(InputError, match=message):
        check_memory(loaded, "m", None, CPU, torch.float32)
    # Numbers that are near to each other differ in the message.
    monkeypatch.setattr(sizes, "free_on", lambda _: needed["int4"] - 2e7)
    with pytest.raises(InputError) as caught:
        check_memory(loaded, "m", "int4", CPU, torch.float32)
    told, free = re.findall(r"([0-9.]+) GB", str(caught.value))
    assert float(told) - float(free) == pytest.approx(0.02)
    # 2. Nothing would.
    monkeypatch.setattr(sizes, "free_on", lambda _: 1e6)
    with pytest.raises(InputError, match=r"'m' in int4 needs .*; close other programs, or use a smaller"):
        check_memory(loaded, "m", "int4", CPU, torch.float32)
    with pytest.raises(InputError, match="without quantisation needs"):
        open_model(tiny_folder)
    monkeypatch.setattr(sizes, "free_on", lambda _: None)
    check_memory(loaded, "m", None, CPU, torch.float32)
