"""Tensors in files: lazily read, written one at a time, and every bad file named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pumice.errors import InputError, WorkError
from pumice.storage.tensors import (
    LazyTensor,
    as_lazy,
    check_same,
    find_weights,
    open_file,
    open_weights,
    write_file,
    write_weights,
)

STATE = {
    "half": torch.arange(3, dtype=torch.float16),  # three: what follows would stand askew
    "whole": torch.arange(6.0).view(2, 3),
    "brain": torch.ones(2, 2, dtype=torch.bfloat16),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
}


def stocks(state: dict[str, Tensor]) -> dict[str, LazyTensor]:
    return {name: as_lazy(tensor) for name, tensor in state.items()}


def same(actual: dict[str, LazyTensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name].shape, actual[name].dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(actual[name].read(), tensor)
        assert actual[name].read(torch.float32).dtype == torch.float32


def test_our_writer_writes_what_the_library_reads(tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", stocks(STATE))
    reference = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(reference[name], tensor) for name, tensor in STATE.items())
    same(open_weights(tmp_path), STATE)


def test_we_read_what_others_write(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors")
    same(open_file(tmp_path / "a.safetensors"), STATE)
    torch.save(STATE, tmp_path / "b.bin")
    same(open_file(tmp_path / "b.bin"), STATE)
    torch.save(STATE, tmp_path / "old.bin", _use_new_zipfile_serialization=False)  # before PyTorch 1.6
    same(open_file(tmp_path / "old.bin"), STATE)


def test_shards_hold_at_most_so_many_bytes_and_are_found_again(tmp_path: Path) -> None:
    state = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}
    write_weights(tmp_path, stocks(state), limit=90)
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 200
    assert index["weight_map"] == {
        "t0": names[0],
        "t1": names[0],
        "t2": names[1],
        "t3": names[1],
        "t4": names[2],
    }
    same(open_weights(tmp_path), state)


def test_a_changed_tensor_is_changed_when_it_is_read() -> None:
    opened_names = []

    def double(tensor: Tensor) -> Tensor:
        opened_names.append(tensor)
        return torch.cat((tensor, tensor))

    doubled = as_lazy(torch.ones(2, dtype=torch.bfloat16)).map(double, (4,))
    assert (doubled.shape, doubled.size, opened_names) == ((4,), 8, [])
    assert torch.equal(doubled.read(torch.float32), torch.ones(4))
    assert doubled.cast(torch.float32).dtype == torch.float32


@pytest.mark.parametrize("other", [0.0, float("inf"), torch.finfo(torch.float32).max])
def test_nan_is_a_copy_of_nan_alone(other: float) -> None:
    spoiled, sound = (as_lazy(torch.tensor([1.0, value])) for value in (float("nan"), other))
    check_same(spoiled, spoiled, "a folder")
    check_same(sound, sound, "a folder")
    with pytest.raises(InputError, match="should be two copies of one tensor, but differ"):
        check_same(spoiled, sound, "a folder")


def test_infinity_is_no_copy_of_the_largest_number() -> None:
    infinite, largest = (
        as_lazy(torch.tensor([value])) for value in (float("inf"), torch.finfo(torch.float32).max)
    )
    with pytest.raises(InputError, match="should be two copies of one tensor, but differ"):
        check_same(infinite, largest, "a folder")


def test_safetensors_come_before_bin(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    assert [p.name for p in find_weights(tmp_path)] == ["pytorch_model.bin"]
    write_weights(tmp_path, stocks(STATE))
    assert find_weights(tmp_path)[0].name == "model.safetensors"
    assert find_weights(tmp_path, "adapter_model") == []


def index(folder: Path, **weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_is_kept_to(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1), "y": torch.zeros(1)}, tmp_path / "one.safetensors")
    for weight_map, message in (
        ({"x": "two.safetensors"}, r"names two\.safetensors, which is not beside it; fetch that file"),
        ({"x": "one.safetensors"}, r"one\.safetensors holds y, which model\.safetensors\.index\.json does"),
        ({"x": "one.safetensors", "y": "one.safetensors", "z": "one.safetensors"}, "says that z is in one"),
        ({"x": "../one.safetensors"}, r"puts x into '\.\./one\.safetensors', which is no file name"),
        ({"x": 1}, "puts x into 1, which is no file name"),
        ({}, r"index\.json names no tensors"),
    ):
        index(tmp_path, **weight_map)
        with pytest.raises(InputError, match=message):
            open_weights(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no weights: neither safetensors nor \.bin$"):
        open_weights(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(InputError, match=r"model-00001-of-00002\.safetensors is there, but no index"):
        open_weights(tmp_path)


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.6, 0.99])
def test_files_that_are_cut_short(tmp_path: Path, name: str, share: float) -> None:
    state = {f"t{i}": torch.full((100,), float(i)) for i in range(9)}
    path = tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)(state, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(
        InputError, match=rf"{name.replace('.', chr(92) + '.')} is (damaged|refused)"
    ) as caught:
        open_file(path)
    assert "\n" not in str(caught.value)


def test_a_pointer_of_git_lfs_is_told(tmp_path: Path) -> None:
    for name in ("x.safetensors", "x.bin"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        with pytest.raises(InputError, match="is a pointer of Git LFS, not the weights"):
            open_file(tmp_path / name)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"hello")
    with pytest.raises(InputError, match=r"x\.bin is damaged"):
        open_file(tmp_path / "x.bin")
    for content in ([torch.zeros(1)], {"a": 1}, {"model": {"a": torch.zeros(1)}}):
        torch.save(content, tmp_path / "x.bin")
        with pytest.raises(InputError, match="does not hold named tensors"):
            open_file(tmp_path / "x.bin")


def test_a_lack_of_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise MemoryError

    torch.save(STATE, tmp_path / "x.bin")
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(MemoryError):
        open_file(tmp_path / "x.bin")


def test_other_types_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write n: torch\.int64 is none of F32, F16, BF16"):
        write_file(tmp_path / "x.safetensors", stocks({"n": torch.arange(3)}))
    assert not (tmp_path / "x.safetensors").exists()


def test_what_is_not_finite_is_not_written(tmp_path: Path) -> None:
    largest = torch.full((8,), torch.finfo(torch.float32).max)  # its sum is infinite, its values are not
    write_file(tmp_path / "x.safetensors", stocks({"a": largest}))
    for value in (torch.nan, -torch.inf):
        with pytest.raises(WorkError, match="b holds nan or inf; get the model again"):
            write_file(tmp_path / "x.safetensors", stocks({"a": largest, "b": torch.tensor([1.0, value])}))
    narrow = as_lazy(torch.tensor([1e5]), "c in model.bin").cast(torch.float16)
    with pytest.raises(InputError, match=r"c in model\.bin has values beyond the 65504 of F16; choose"):
        write_file(tmp_path / "x.safetensors", {"c": narrow})
