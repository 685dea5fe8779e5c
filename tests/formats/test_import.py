"""`pumice import`: every kind becomes the same folder, whole or not at all, and can be asked."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pumice.assistant import load
from pumice.cli import app
from pumice.errors import InputError, WorkError
from pumice.formats.export import export
from pumice.formats.import_ import import_model
from pumice.formats.load import build, new_parts, open_model
from pumice.formats.pumice import folder
from pumice.formats.pumice.folder import open_parts
from pumice.formats.read import check_sees, read_model
from pumice.storage import tensors

Llavas = Callable[[str], Path]
Parts = tuple[Path, Path]


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.mark.parametrize("kind", ["llava", "siglip", "next", "onevision"])
def test_the_imported_folder_is_the_model(llava: Llavas, tmp_path: Path, kind: str) -> None:
    import_model(str(llava(kind)), tmp_path / "m")
    assert sorted(contents(tmp_path / "m")) == [
        "config.json", "model.safetensors", "provenance.json", "tokenizer.json"
    ]  # fmt: skip
    original, imported = open_model(llava(kind)), open_model(tmp_path / "m")
    assert imported.model.config == original.model.config
    state = imported.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in original.model.state_dict().items())
    import_model(str(tmp_path / "m"), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "m")


def test_provenance_says_where_it_comes_from(llava: Llavas, tmp_path: Path) -> None:
    source = llava("llava")
    import_model(str(source), tmp_path / "m", template="v1")
    imported = json.loads((tmp_path / "m" / "provenance.json").read_text())["imported"]
    digest = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    assert imported["kind"] == "a LLaVA of transformers"
    assert imported["model"] == {"source": str(source), "sha256": {"model.safetensors": digest}}
    assert imported["assumed"] == []


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_another_type(llava: Llavas, tmp_path: Path, dtype: str) -> None:
    import_model(str(llava("llava")), tmp_path / "m", dtype=dtype)
    expected_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    state = load_file(tmp_path / "m" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {expected_dtype}
    stored_tensors = load_file(tmp_path / "m" / "model.safetensors")
    import_model(str(tmp_path / "m"), tmp_path / "kept")
    assert all(torch.equal(stored_tensors[name], tensor) for name, tensor in state.items())


def test_large_models_are_written_in_shards(
    llava: Llavas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_model(str(llava("llava")), tmp_path / "one")
    monkeypatch.setattr(tensors.write_weights, "__defaults__", ("model", 50_000))
    import_model(str(llava("llava")), tmp_path / "many")
    shards = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors*"))
    assert shards[-1] == "model.safetensors.index.json"
    assert len(shards) > 3
    one, sharded = open_parts(tmp_path / "one").state, open_parts(tmp_path / "many").state
    assert one.keys() == sharded.keys()
    assert all(torch.equal(sharded[name].read(), tensor.read()) for name, tensor in one.items())
    monkeypatch.undo()
    import_model(str(llava("llava")), tmp_path / "many")  # the shards of before are gone
    assert [p.name for p in (tmp_path / "many").glob("*.safetensors*")] == ["model.safetensors"]


def test_a_bare_llm_and_a_bare_tower(parts_of: Parts, tmp_path: Path) -> None:
    tower, llm = map(str, parts_of)
    imported = import_model(llm, tmp_path / "m", tower=tower)
    assert "the connector is fresh: train it first" in imported.model.notes
    opened = open_model(tmp_path / "m")
    assert opened.model.config.vision.kind == "clip"
    assert opened.model.config.image.mode == "crop"
    assert set(json.loads((tmp_path / "m" / "provenance.json").read_text())["imported"]) >= {"model", "tower"}


def test_a_recipe_may_start_from_them(parts_of: Parts) -> None:
    tower, llm = map(str, parts_of)
    new = new_parts(
        tower, llm, vision={"image_size": 24, "layer": -1}, connector={"kind": "linear"},
        image={"mode": "pad"}, template="v1",
    )  # fmt: skip
    opened = build(new, "new", torch.device("cpu"), torch.float32, merge=False)
    config = opened.model.config
    assert (config.vision.grid, config.image_tokens, config.vision.layer) == (6, 36, -1)
    assert opened.model.tower.positions.shape == (37, 24)  # interpolated
    assert (config.image.pad_color, config.bos_token_id) == ((122, 116, 104), 1)
    assert new.parts == {}
    assert new.state.keys() == opened.model.state_dict().keys()
    with pytest.raises(
        InputError, match=r"vision: depth follows from .*config\.json; only layer, select, image"
    ):
        new_parts(tower, llm, vision={"depth": 2}, connector={}, image={}, template="v1")
    with pytest.raises(InputError, match="is a bare language model, not a vision tower"):
        new_parts(llm, llm, vision={}, connector={}, image={}, template="v1")
    with pytest.raises(InputError, match="is a bare vision tower, not a language model"):
        new_parts(tower, tower, vision={}, connector={}, image={}, template="v1")


def test_models_of_others_are_asked_directly(
    llava: Llavas, parts_of: Parts, write_gguf: Any, tmp_path: Path
) -> None:
    picture = Image.new("RGB", (30, 20), "red")
    sampling = {"max_new_tokens": 3}
    for kind in ("llava", "next"):
        import_model(str(llava(kind)), tmp_path / kind)
        direct = load(llava(kind), device="cpu", quantize=None).ask(picture, "hello", **sampling)
        assert direct == load(tmp_path / kind, device="cpu", quantize=None).ask(picture, "hello", **sampling)
    alone = load(parts_of[1], device="cpu", quantize=None)
    alone.ask(None, "hello", **sampling)
    with pytest.raises(InputError, match="a language model without a vision tower; ask it without pictures"):
        alone.ask(picture, "hello")
    write_gguf(tmp_path / "m.gguf")
    import_model(str(tmp_path / "m.gguf"), tmp_path / "gguf", template="chatml", dtype="bf16")
    assert open_model(tmp_path / "gguf").model.config.vision.kind == "none"
    for blind in (parts_of[1], tmp_path / "m.gguf", tmp_path / "gguf"):
        with pytest.raises(InputError, match="a language model without a vision tower"):
            check_sees(blind, None)
    for seeing in ("pumice-tiny", llava("llava"), tmp_path / "llava"):
        check_sees(seeing, None)


def test_what_is_there_is_not_written_over(llava: Llavas, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(llava("llava"), source)
    before = contents(source)
    with pytest.raises(InputError, match="is the model to import; name another folder"):
        import_model(str(source), source)
    other = tmp_path / "other"
    shutil.copytree(llava("next"), other)
    with pytest.raises(InputError, match="other holds other files than a Pumice model; name a new folder"):
        import_model(str(source), other)
    assert contents(source) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "source"]


class Disk(NamedTuple):
    total: int
    used: int
    free: int


def test_a_full_disk_leaves_nothing(llava: Llavas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def full(path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        written.append(path)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensors, "write_file", full)
    with pytest.raises(
        WorkError, match=r"cannot write .*m \(No space left on device\); nothing was left there"
    ):
        import_model(str(llava("llava")), tmp_path / "m")
    assert written
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: Disk(0, 0, 1000))
    with pytest.raises(InputError, match=r"m needs 0\.\d MB, 0\.0 MB are free there; choose another disk"):
        import_model(str(llava("llava")), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_of_a_bad_source(llava: Llavas, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(llava("llava"), source)
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors is damaged or cut short"):
        import_model(str(source), tmp_path / "deep" / "m")
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("target", ["pumice", "hf"])
def test_spoiled_weights_are_not_written(llava: Llavas, tmp_path: Path, target: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(llava("llava"), source)
    tensors = load_file(source / "model.safetensors")
    name = max(tensors)
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(WorkError, match=r"in model\.safetensors holds nan or inf; get the model again"):
        if target == "hf":
            export(read_model(source), target, tmp_path / "m")
        else:
            import_model(str(source), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_the_command(llava: Llavas, tmp_path: Path) -> None:
    source, target = str(llava("llava")), str(tmp_path / "m")
    result = CliRunner().invoke(app, ["import", source, target, "--template", "v1"])
    assert result.exit_code == 0, result.output
    assert f"{source} is a LLaVA of transformers\n" in result.stdout
    assert result.stdout.endswith(f"The model is in {target}\n")
    again = CliRunner().invoke(app, ["import", source, target, "--json"])
    report = json.loads(again.stdout)
    assert (report["folder"], report["template"], report["notes"]) == (target, "chatml", [])
    for arguments in (["--dtype", "int8"], ["--base", "x"]):
        wrong = CliRunner().invoke(app, ["import", source, str(tmp_path / "n"), *arguments])
        assert (wrong.exit_code, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
    wrong = CliRunner().invoke(app, ["import", "nobody/nothing", str(tmp_path / "n")])
    assert wrong.exit_code == 2
    assert "nobody/nothing is not in the hub's cache and cannot be fetched" in wrong.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_blocks_that_are_not_kept_are_told(write_gguf: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", quantised="Q4_0")
    for options, stored in (([], "F32"), (["--dtype", "fp16"], "F16"), (["--quantize", "int8"], None)):
        target = str(tmp_path / "-".join(["m", *options]))
        arguments = ["import", str(tmp_path / "m.gguf"), target, "--template", "chatml", "--json", *options]
        values = json.loads(CliRunner().invoke(app, arguments).stdout)
        told = (
            f"matrices in Q4_0 are stored as {stored}, which takes more room; "
            "--quantize int8 leaves them as they are"
        )
        assert (told in values["notes"]) == (stored is not None), values["notes"]
        assert ("Q4_0" in values["types"]) == (stored is None)
        assert stored is None or stored in values["types"]
