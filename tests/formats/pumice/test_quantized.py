"""Folders whose language model is stored in few bits: opened as they lie, whole or refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from pumice.assistant import load
from pumice.errors import InputError, WorkError
from pumice.formats import quantize as quantize_module
from pumice.formats import sizes
from pumice.formats.export import export
from pumice.formats.gguf.file import GgufFile
from pumice.formats.import_ import import_model
from pumice.formats.load import open_model
from pumice.formats.pumice import quantized
from pumice.formats.pumice.folder import open_parts
from pumice.formats.quantize import quantize_state
from pumice.formats.read import read_model
from pumice.kernels.packed import BlockFormat, PackedMatrix
from pumice.model.quantized import PackedEmbedding, PackedLinear
from pumice.storage import tensors
from pumice.storage.tensors import close_last_file, open_file

BITS = pytest.mark.parametrize("bits", ["int8", "int4"])


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    import_model(str(tiny_folder), tmp_path / "small", quantize="int4")
    return tmp_path / "small"


@BITS
def test_a_stored_model_is_the_one_that_is_quantised_when_it_is_opened(
    tiny_folder: Path, tmp_path: Path, bits: str
) -> None:
    imported = import_model(str(tiny_folder), tmp_path / "small", quantize=bits)
    files = sorted(path.name for path in (tmp_path / "small").iterdir())
    assert files == [
        "config.json", "model.safetensors", "provenance.json", "quantized.json", "quantized.safetensors",
        "tokenizer.json",
    ]  # fmt: skip
    held = sum((tmp_path / "small" / name).stat().st_size for name in files if "safetensors" in name)
    assert held == pytest.approx(imported.summary()["bytes"], rel=0.05)
    quantized_now = open_model(tiny_folder, quantize=bits).model.decoder
    stored = open_model(tmp_path / "small", quantize="auto").model.decoder
    for stored_module, module in zip(stored.modules(), quantized_now.modules(), strict=True):
        if isinstance(stored_module, PackedLinear):
            assert isinstance(module, PackedLinear) and stored_module.kind is module.kind
            assert torch.equal(stored_module.data, module.data)
    asked = [load(path, device="cpu", quantize="auto" if path != tiny_folder else bits)
             for path in (tmp_path / "small", tiny_folder)]  # fmt: skip
    first, second = (assistant.ask(None, "What?", max_new_tokens=8) for assistant in asked)
    assert first == second


def test_it_is_mapped_not_copied(folder: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not list mappings")
    model = open_model(folder, quantize="auto").model
    layer = model.decoder.blocks[0].mlp.up
    assert isinstance(layer, PackedLinear)
    [line] = [
        line for line in maps.read_text().splitlines()
        if int(line.split("-")[0], 16) <= layer.data.data_ptr() < int(line.split("-")[1].split()[0], 16)
    ]  # fmt: skip
    assert line.endswith("quantized.safetensors")


def test_on_other_devices_the_blocks_stay_too(
    folder: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No floats of the whole decoder are put there first, and stored blocks are not quantised once more."""
    with monkeypatch.context() as patch:
        patch.setattr(quantize_module, "quantize", lambda *_: pytest.fail("it was quantised again"))
        stored = open_model(folder, device="meta", dtype=torch.bfloat16, quantize="int4").model
    fresh = open_model(tiny_folder, device="meta", dtype=torch.bfloat16, quantize="int4").model
    matrices = {name: tensor.blocks for name, tensor in open_parts(folder).state.items() if tensor.blocks}
    for model in (stored, fresh):
        layers = {
            f"decoder.{name}.weight": module.kind
            for name, module in model.decoder.named_modules()
            if isinstance(module, PackedLinear | PackedEmbedding)
        }
        assert layers == {name: blocks.kind for name, blocks in matrices.items()}
        assert all(tensor.is_meta for tensor in (*model.parameters(), *model.decoder.buffers()))
        assert model.dtype == torch.bfloat16


def test_only_a_cpu_computes_with_mapped_pages(folder: Path, tiny_folder: Path) -> None:
    """What another device computes with needs memory there, whether it is stored quantised or not."""
    stored, fresh = read_model(folder), read_model(tiny_folder)
    matrices = sum(tensor.size for tensor in quantized.as_bytes(stored.state).values())

    def difference(device: str) -> float:
        needed = (sizes.least_memory(m, "int4", torch.device(device), torch.float32) for m in (fresh, stored))
        return next(needed) - next(needed)

    assert (difference("cpu"), difference("meta")) == (matrices, 0)


def test_floats_are_what_the_blocks_stand_for(folder: Path, tmp_path: Path) -> None:
    """For training, other devices, and other formats."""
    plain = open_model(folder).model.decoder.state_dict()
    for name, matrix in open_parts(folder).state.items():
        if matrix.blocks is not None:
            expected = plain[name.removeprefix("decoder.")]
            assert torch.equal(expected, matrix.blocks.fetch().restored())
    import_model(str(folder), tmp_path / "again")
    for name in ("quantized.json", "quantized.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("form", ["Q8_0", "Q4_0", "Q4_1"])
def test_blocks_of_gguf_are_kept_bit_for_bit(
    write_gguf: Callable[..., Any], tmp_path: Path, form: str
) -> None:
    source = tmp_path / "model.gguf"
    write_gguf(source, quantised=form)
    import_model(str(source), tmp_path / "m", template="plain", quantize="int8")
    state = open_parts(tmp_path / "m").state
    file = GgufFile(source)
    for name, gguf_name in (("blocks.0.mlp.up", "blk.0.ffn_up"), ("embed", "token_embd")):
        blocks = state[f"decoder.{name}.weight"].blocks
        assert blocks is not None and blocks.kind is BlockFormat[form]
        assert torch.equal(blocks.fetch().blocks(), file.blocks(f"{gguf_name}.weight"))
    # Rows of queries are turned into our order
    query = state["decoder.blocks.0.attention.q.weight"].blocks
    assert query is not None
    expected = open_model(source, template="plain").model.decoder.blocks[0].attention.q.weight
    assert torch.equal(query.fetch().restored(), expected)
    assert gguf.GGMLQuantizationType[form] == query.kind.ggml


@pytest.mark.parametrize("form", ["Q8_0", "Q4_0", "Q4_1"])
def test_blocks_leave_as_they_came(write_gguf: Callable[..., Any], tmp_path: Path, form: str) -> None:
    source = tmp_path / "model.gguf"
    write_gguf(source, quantised=form)
    import_model(str(source), tmp_path / "m", template="chatml", quantize="int8")
    export(read_model(tmp_path / "m"), "gguf", tmp_path / "out", kind="keep")
    original, exported = GgufFile(source), GgufFile(tmp_path / "out" / "model-keep.gguf")
    matrices = [name for name, info in original.infos.items() if len(info.shape) == 2]
    assert len(matrices) == 15
    for name in matrices:
        assert exported.infos[name].kind == BlockFormat[form].ggml
        assert torch.equal(exported.blocks(name), original.blocks(name))


def test_eight_bits_become_four_where_that_is_asked(write_gguf: Callable[..., Any], tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", quantised="Q8_0")
    import_model(str(tmp_path / "model.gguf"), tmp_path / "m", template="plain", quantize="int4")
    kinds = json.loads((tmp_path / "m" / "quantized.json").read_text())["matrices"]
    assert kinds["decoder.blocks.0.mlp.up.weight"]["kind"] == "Q4_K"
    assert kinds["decoder.embed.weight"]["kind"] == "Q8_0"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_bad_files_are_refused(folder: Path) -> None:
    index, weights = folder / quantized.INDEX, folder / quantized.FILE
    name = "decoder.blocks.0.mlp.up.weight"
    text, data = index.read_text(), weights.read_bytes()
    cases: list[tuple[Callable[[dict[str, Any]], object], str]] = [
        (lambda v: v.update(layout=99), "says layout 99, this version of Pumice reads layout 1; import"),
        (lambda v: v["matrices"].pop(name), "do not name the same matrices"),
        (lambda v: v.update(matrices=3), "do not name the same matrices"),
        (lambda v: v["matrices"][name].update(kind="Q3_K"), f"of {name}, which is not what"),
        (lambda v: v["matrices"][name].update(shape=[96, 96]), f"of {name}, which is not what"),
        (lambda v: v["matrices"][name].update(shape=[96, 40]), f"of {name}, which is not what"),
        (lambda v: v["matrices"].update({name: None}), f"of {name}, which is not what"),
    ]
    for change, message in cases:
        edit(index, change)
        with pytest.raises(InputError, match=re.escape(message)):
            open_parts(folder)
        index.write_text(text)
    index.unlink()
    with pytest.raises(InputError, match=re.escape(f"{index} is missing, which describes")):
        open_parts(folder)
    index.write_text(text)
    weights.write_bytes(data[:-100])
    with pytest.raises(InputError, match="damaged or cut short"):
        open_parts(folder)
    weights.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        open_parts(folder)


def test_weights_that_are_not_finite_leave_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    weights = shutil.copytree(tiny_folder, tmp_path / "bad") / "model.safetensors"
    tensors = load_file(weights)
    tensors["decoder.blocks.1.mlp.down.weight"][5, 3] = torch.inf
    save_file(tensors, weights)
    with pytest.raises(WorkError, match=r"mlp\.down\.weight.*holds a weight that is not finite in row 5"):
        import_model(str(tmp_path / "bad"), tmp_path / "m", quantize="int8")
    assert not (tmp_path / "m").exists()
    with pytest.raises(WorkError, match="not finite in row 5"):
        open_model(tmp_path / "bad", quantize="auto")


def test_a_full_disk_leaves_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    """Files here may hold 50 kB: writing more fails as it does on a full disk."""
    pytest.importorskip("resource", reason="this system limits no files")
    code = (
        "import resource, sys\n"
        "from pumice.__main__ import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "sys.argv = ['pumice', 'import', *sys.argv[1:], '--quantize', 'int8']\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tiny_folder, tmp_path / "m"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done
    assert re.search(r"cannot write .*m \(File too large\); nothing was left there", done.stderr)
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_is_mapped_needs_no_memory_of_its_own(
    tiny_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = [
        sizes.least_memory(read_model(path), "int8", torch.device("cpu"), torch.float32)
        for path in (folder, tiny_folder)
    ]
    assert needed[0] < needed[1]
    monkeypatch.setattr(sizes, "free_on", lambda _: sum(needed) / 2)
    assert open_model(folder, quantize="int8").model is not None
    with pytest.raises(InputError, match=r"in int8 needs .* GB of memory are free"):
        open_model(tiny_folder, quantize="int8")
    monkeypatch.setattr(sizes, "free_on", lambda _: 0.0)
    with pytest.raises(InputError, match=r"small' as it is stored needs .* GB"):  # in 4 bits
        open_model(folder, quantize="auto")


def test_long_quantising_shows_progress_and_names_import(
    tiny_folder: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")  # no codes that move the cursor
    open_model(tiny_folder, quantize="int4")
    assert not caplog.records and not capsys.readouterr().err  # it was quick
    monkeypatch.setattr(quantize_module, "PATIENCE", 0.0)
    open_model(tiny_folder, quantize="int4")
    [record] = caplog.records
    assert record.getMessage().startswith(f"{tiny_folder} is quantised at every start; `pumice import ")
    assert "--quantize int4" in record.getMessage()
    shown = capsys.readouterr().err
    assert "15 of 15 matrices quantised to int4" in " ".join(shown.split())
    caplog.clear()
    open_model(folder, quantize="auto")  # which is stored quantised
    assert not caplog.records and not capsys.readouterr().err


def test_a_bin_is_opened_once_and_its_pages_are_given_back(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = open_parts(tiny_folder)
    torch.save({name: tensor.read() for name, tensor in parts.state.items()}, tmp_path / "model.bin")
    state = parts.state | open_file(tmp_path / "model.bin")
    opened: list[Path] = []
    plain = tensors._Bin._open

    def noted(self: tensors._Bin) -> Any:
        opened.append(self.path)
        return plain(self)

    def count() -> int:
        close_last_file()
        opened.clear()
        for name, tensor in quantize_state(parts.config, state, "int8").items():
            if name.startswith("decoder.") and tensor.blocks is not None:
                tensor.blocks.fetch()
        return len(opened)

    monkeypatch.setattr(tensors._Bin, "_open", noted)
    assert count() == 1
    monkeypatch.setattr(quantize_module, "MAPPED_BYTES", 1)
    assert count() == 15  # so that no more than one matrix's pages are in memory


def test_a_built_in_model_is_quantised_once(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("pumice.formats.load.BUILT_IN", tmp_path)
    shutil.copytree(tiny_folder, tmp_path / "built-in")
    quantized_names: list[str] = []
    plain = quantize_module.quantize

    def noted(weight: torch.Tensor, kind: BlockFormat, name: str) -> PackedMatrix:
        quantized_names.append(name)
        return plain(weight, kind, name)

    def data(bits: str = "int4") -> torch.Tensor:
        layer = open_model(tmp_path / "built-in", quantize=bits).model.decoder.blocks[1].mlp.down
        assert isinstance(layer, PackedLinear)
        return layer.data

    monkeypatch.setattr(quantize_module, "quantize", noted)
    first = data()
    assert len(quantized_names) == 15
    [folder] = (tmp_path / "cache" / "quantized").iterdir()
    assert torch.equal(data(), first) and len(quantized_names) == 15  # from the cache
    data("int8")
    assert len(quantized_names) == 30  # which is something else
    (folder / quantized.FILE).unlink()  # what is mapped must not be written over
    (folder / quantized.FILE).write_bytes(b"damaged")
    assert torch.equal(data(), first) and len(quantized_names) == 45
    assert torch.equal(data(), first) and len(quantized_names) == 60  # put there again
    assert torch.equal(data(), first) and len(quantized_names) == 60
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file is in the way")
    assert torch.equal(data(), first)


def test_weights_that_stay_in_fewer_bits_than_asked_for_are_told(folder: Path, tmp_path: Path) -> None:
    again = import_model(str(folder), tmp_path / "again", quantize="int8")
    assert [note for note in again.summary()["notes"] if note.startswith("matrices in Q4_1 stay so: int8")]
    assert "Q4_1" in again.summary()["types"]
    fewer = import_model(str(folder), tmp_path / "fewer", quantize="int4")
    assert not [note for note in fewer.summary()["notes"] if "stay so" in note]
