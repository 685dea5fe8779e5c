"""A pretend hub: what cannot fit is refused before its weights are fetched; what fits is fetched once."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfFileSystem, constants
from pretend_hub import BLOCK, WEIGHTS, Hub
from safetensors.torch import load_file, save_file

from pumice import InputError
from pumice.formats import read, sizes
from pumice.formats.export import export
from pumice.formats.gguf import file as gguf_file
from pumice.formats.gguf.file import GgufFile
from pumice.formats.import_ import import_model
from pumice.formats.load import open_model
from pumice.formats.read import find_model, read_model, read_or_outline
from pumice.formats.sizes import least_memory, weight_sizes
from pumice.storage import download
from pumice.storage.download import locate
from pumice.storage.outline import ValuesNotHere, outlines
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import as_lazy, write_weights
from pumice.train.plan import asking
from pumice.train.plan.asking import plan_ask

CPU = torch.device("cpu")


LLAVA = "CLIP + Llama, pad (LLaVA 1.5)"


@pytest.fixture(scope="module")
def folder(models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of transformers, which can be quantised. Not to be changed."""
    folder = tmp_path_factory.mktemp("outline") / "model"
    export(models.tiny(models.ARCHITECTURES[LLAVA]), "hf", folder)
    return folder


def stored(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in WEIGHTS)


def most_of_outline(folder: Path) -> int:
    """The bytes of weights that an outline may fetch: their headers, and a block for each of two reads."""
    files = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
    return sum(8 + int.from_bytes(path.read_bytes()[:8], "little") + 2 * BLOCK for path in files)


def shard(folder: Path) -> None:
    """Store the weights in shards with an index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_weights(folder, {name: as_lazy(tensor) for name, tensor in state.items()}, limit=100_000)
    assert len(list(folder.glob("*.safetensors"))) > 2


def all_sizes(loaded: LoadedParts) -> list[dict[str, int]]:
    return [weight_sizes(loaded, kind, CPU, torch.float32) for kind in (None, "int8", "int4")]


@pytest.mark.parametrize("shards", [False, True])
def test_what_cannot_fit_is_refused_before_it_is_fetched(
    shards: bool, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = hub.add("owner/model", folder)
    if shards:
        shard(remote)
    loaded = read_model(remote)
    needed = {kind: least_memory(loaded, kind, CPU, torch.float32) for kind in (None, "int8", "int4")}
    refused = [(needed["int4"], None), (needed["int4"], "int8"), (1e6, "auto"), (1e6, "int4")]
    for free, kind in refused:
        monkeypatch.setattr(sizes, "free_on", lambda _, free=free: free)
        told = []
        for source in (str(remote), "owner/model"):
            with pytest.raises(InputError) as caught:
                open_model(source, quantize=kind)
            told.append(str(caught.value).replace(str(remote), "owner/model"))
        # The same sentence as for a folder, with the same remedy.
        assert told[0] == told[1]
        assert ("use --quantize int4" in told[1]) == (free > 1e6)
    assert 0 < hub.weight_bytes() <= len(refused) * most_of_outline(remote) < stored(remote)
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))
    # What fits is fetched then, and once.
    monkeypatch.setattr(sizes, "free_on", lambda _: needed["int4"])
    hub.sent.clear()
    open_model("owner/model", quantize="int4")
    assert stored(remote) < hub.weight_bytes() <= stored(remote) + most_of_outline(remote)
    assert "owner/model/config.json" not in [file for file, size in hub.sent if size]
    # A model in the cache needs one question about its revision, and offline none.
    hub.sent.clear()
    open_model("owner/model", quantize="int4")
    assert hub.sent == [("", hub.sent[0][1])]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.sent.clear()
    open_model("owner/model", quantize="int4")
    assert hub.sent == []


def test_a_list_that_fails_once_is_asked_for_again(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("owner/model", folder)
    monkeypatch.setattr(sizes, "free_on", lambda _: 1e6)
    list_files, calls = HfFileSystem.ls, itertools.count()

    def fail_once(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 0:
            raise ConnectionError("reset by peer")
        return list_files(*arguments, **options)

    monkeypatch.setattr(HfFileSystem, "ls", fail_once)
    with pytest.raises(InputError, match="of memory are free"):
        open_model("owner/model")
    assert hub.weight_bytes() <= most_of_outline(folder)


def test_the_first_model_of_an_empty_machine_is_fetched_once(hub: Hub, folder: Path) -> None:
    remote = hub.add("owner/model", folder)
    open_model("owner/model@main")
    fetched = [file for file, size in hub.sent if size > BLOCK and not file.endswith(WEIGHTS) and file]
    assert len(fetched) == len(set(fetched)) > 0
    assert hub.weight_bytes() <= stored(remote) + most_of_outline(remote)


@pytest.mark.parametrize("kind", ["pumice", "pumice in int4", "original code", "LLM"])
def test_the_outline_of_each_format_has_the_sizes_of_the_model(
    kind: str, hub: Hub, models: ModuleType, folder: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    if kind == "original code":
        export(models.tiny(models.ARCHITECTURES[LLAVA]), "llava", made)
        shutil.move(made / "vision_tower", tmp_path / "eye")
        hub.add("owner/eye", tmp_path / "eye")
        config = json.loads((made / "config.json").read_text())
        (made / "config.json").write_text(json.dumps(config | {"mm_vision_tower": "owner/eye"}))
        state = load_file(made / "model.safetensors")
        (made / "model.safetensors").unlink()
        torch.save(state, made / "pytorch_model.bin")
        torch.save({"step": 3}, made / "training_args.bin")  # not needed: that it has no outline is no matter
    elif kind == "LLM":
        made.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(folder / name, made)
        config = json.loads((folder / "config.json").read_text())["text_config"]
        (made / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
        state = load_file(folder / "model.safetensors")
        start = "language_model."
        state = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
        assert state
        save_file(state, made / "model.safetensors")
    else:
        import_model(str(folder), made, quantize="int4" if "int4" in kind else None)
    remote = hub.add("owner/model", made)
    template = None if kind.startswith("pumice") else "v1"
    loaded, missing = read_or_outline("owner/model", template=template)
    assert missing == stored(remote)
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.bin"))
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))
    whole, missing = read_or_outline("owner/model", template=template)
    expected = read_model("owner/model", template=template)
    assert all_sizes(loaded) == all_sizes(whole) == all_sizes(expected)
    assert loaded.config == expected.config
    assert read_or_outline("owner/model", template=template)[1] == 0  # all is here


def test_the_base_of_an_adapter_is_outlined(hub: Hub, models: ModuleType, tmp_path: Path) -> None:
    model = models.tiny(models.ARCHITECTURES["CLIP + Llama, LoRA"])
    export(model, "peft", tmp_path / "adapter")
    export(model, "hf", tmp_path / "base", drop_lora=True)
    remote = hub.add("owner/base", tmp_path / "base")
    loaded, missing = read_or_outline(tmp_path / "adapter", base="owner/base")
    assert missing == stored(remote)
    assert 0 < hub.weight_bytes() <= most_of_outline(remote)
    assert all_sizes(loaded) == all_sizes(read_model(tmp_path / "adapter", base="owner/base"))


def test_a_tower_on_the_hub_is_outlined_with_the_folder(
    hub: Hub, original: Callable[..., Path], parts_of: tuple[Path, Path]
) -> None:
    tower, _ = parts_of
    remote = hub.add("owner/eye", tower)
    state = load_file(remote / "model.safetensors")
    (remote / "model.safetensors").unlink()
    # A checkpoint of an older transformers, which also stores the numbers of its positions.
    positions = next(value for name, value in state.items() if "position_embedding" in name).shape[0]
    prefix = next(name for name in state if "embeddings." in name).partition("embeddings.")[0]
    torch.save(
        {**state, f"{prefix}embeddings.position_ids": torch.arange(positions)}, remote / "pytorch_model.bin"
    )
    local = original(mm_vision_tower="owner/eye")
    whole = torch.load(local / "pytorch_model.bin")
    torch.save(
        {name: value for name, value in whole.items() if "vision_tower" not in name},
        local / "pytorch_model.bin",
    )
    loaded, missing = read_or_outline(local)
    assert missing == stored(remote)
    assert hub.weight_bytes("owner/eye") < missing / 2
    sizes_without_quantisation = weight_sizes(loaded, None, CPU, torch.float32)
    assert sizes_without_quantisation == weight_sizes(read_model(local), None, CPU, torch.float32)
    assert hub.weight_bytes("owner/eye") >= missing


def test_a_plan_fetches_no_weights(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = hub.add("owner/model", folder)
    monkeypatch.setattr(asking, "time_answer", lambda *_: (1.0, 0.5))
    local, plan = plan_ask(str(remote), "cpu"), plan_ask("owner/model", "cpu")
    assert [cost.memory for cost in plan.costs] == [cost.memory for cost in local.costs]
    assert (plan.prompt_tokens, plan.image_tokens) == (local.prompt_tokens, local.image_tokens)
    assert plan.notes[-1] == "the weights are not here yet: the first question fetches 0.00 GB"
    assert 0 < hub.weight_bytes() <= most_of_outline(remote)
    open_model("owner/model")
    assert not any("fetches" in note for note in plan_ask("owner/model", "cpu").notes)


def test_other_files_of_a_cached_repository_are_not_copied(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the same model in GGUF."""
    hub.add("owner/model", folder)
    read_or_outline("owner/model")
    config = next(Path(constants.HF_HUB_CACHE).rglob("config.json"))
    config.with_name("model-f16.gguf").write_bytes(b"GGUF")
    copied: list[str] = []
    copy = shutil.copyfile

    def noted(source: Path, target: Path) -> Any:
        copied.append(target.name)
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", noted)
    read_or_outline("owner/model")
    assert "config.json" in copied
    assert "model-f16.gguf" not in copied


@pytest.mark.filterwarnings("ignore:Not enough free disk space")  # the client's own, beside our error
def test_a_full_disk_is_told_before_the_weights_are_fetched(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = hub.add("owner/model", folder)
    cache = constants.HF_HUB_CACHE
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, stored(remote) - 1))
    for reader in (open_model, read_model):  # to ask, and to train or to import
        hub.sent.clear()
        with pytest.raises(
            InputError, match=rf"the download of owner/model into {cache} needs .* set HF_HOME"
        ):
            reader("owner/model")
        assert hub.weight_bytes() <= most_of_outline(remote)
    # What an interrupted download has already taken counts as free.
    blobs = Path(cache) / "models--owner--model" / "blobs"
    blobs.mkdir(exist_ok=True, parents=True)
    (blobs / "weights.incomplete").write_bytes(bytes(100))
    read_model("owner/model")


FULL = r"the download of owner/model into .* does not fit; free some space"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), FULL),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), FULL),
        (
            PermissionError(errno.EACCES, "Permission denied", "/cache/x"),
            r"cannot keep owner/model in .*: Permission denied; set HF_HOME to a folder that you may write",
        ),
        (ConnectionError(errno.ECONNREFUSED, "Connection refused"), r"check the network"),
    ],
)
def test_a_disk_that_fills_up_or_may_not_be_written_is_named(
    error: OSError, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match=message):
        download.from_hub("owner/model")


def test_a_disk_that_is_not_there_is_left_to_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a drive of Windows, which is its own parent."""
    looks = itertools.count()

    def exists(_: Path) -> bool:
        assert next(looks) < 100
        return False

    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(Path, "exists", exists)
        download._check_disk("owner/model", 1)


def test_of_gguf_only_what_is_named_is_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made"
    made.mkdir()
    names = ("m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-mmproj-f16.gguf", "m-mmproj-f32.gguf")
    for name in names:
        (made / name).write_bytes(name.encode() * 100)
    hub.add("owner/model", made)
    # What no file is, or more than one, is refused before anything is fetched.
    with pytest.raises(InputError, match="should have one GGUF file of type Q4, and has none"):
        download.gguf_from_hub("owner/model:Q4")
    usage = type(shutil.disk_usage("/"))
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 1000))
        for name in ("owner/model:Q4_K_S", "owner/model/m-Q4_K_S.gguf"):
            with pytest.raises(InputError, match=r"the download of owner/model into .* needs 0\.00 GB"):
                locate(name) if name.endswith(".gguf") else download.gguf_from_hub(name)
    assert not any(file for file, _ in hub.sent)
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        model, mmproj = download.gguf_from_hub("owner/model:q4_k_s")
        assert mmproj is not None and (model.name, mmproj.name) == (names[1], names[2])
        assert model.read_bytes() == (made / names[1]).read_bytes()
    assert {Path(file).name for file, size in hub.sent if file and size} == {names[1], names[2]}


@pytest.mark.parametrize("name", ["owner/model:Q8_0", "owner/model/m-Q8_0.gguf"])
def test_a_plan_of_gguf_fetches_its_headers(
    name: str, hub: Hub, models: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.tiny(models.ARCHITECTURES["SigLIP + Qwen2, squash"])
    export(model, "gguf", tmp_path / "made", kind="q8_0")
    [decoder] = [path for path in (tmp_path / "made").glob("*.gguf") if "mmproj" not in path.name]
    decoder.rename(decoder.with_name("m-Q8_0.gguf"))
    remote = hub.add("owner/model", tmp_path / "made")
    local = remote if ":" in name else remote / "m-Q8_0.gguf"
    monkeypatch.setattr(gguf_file, "_HEADER_PARTS", (1 << 10, 1 << 15, 1 << 20))
    loaded, missing = read_or_outline(name)
    assert missing == sum(
        path.stat().st_size for path in (remote.glob("*.gguf") if local == remote else [local])
    )
    whole = read_model(local)
    assert all_sizes(loaded) == all_sizes(whole)
    assert loaded.config == whole.config
    assert 0 < hub.weight_bytes() < missing
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.gguf"))
    monkeypatch.setattr(asking, "time_answer", lambda *_: (1.0, 0.5))
    assert [cost.memory for cost in plan_ask(name, "cpu").costs] == [
        cost.memory for cost in plan_ask(str(local), "cpu").costs
    ]
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.gguf"))
    # A small tensor, such as the divisors of frequencies, can be read.
    with outlines():
        file, there = GgufFile(find_model(name)), GgufFile(remote / "m-Q8_0.gguf")
        assert torch.equal(file.tensor("output_norm.weight"), there.tensor("output_norm.weight"))
        monkeypatch.setattr(gguf_file, "_SMALL_TENSOR", 16)
        with pytest.raises(ValuesNotHere):
            file.tensor("output_norm.weight")
    # What does not fit is refused before it is fetched.
    monkeypatch.setattr(sizes, "free_on", lambda _: 1e6)
    hub.sent.clear()
    with pytest.raises(InputError, match=r"without quantisation needs .* of memory are free"):
        open_model(name, quantize=None)
    assert hub.weight_bytes() < missing
    # Matrices in few bits are mapped from a copy: they need no memory of their own.
    monkeypatch.setattr(sizes, "free_on", lambda _: None)
    open_model(name, quantize="int8")
    assert read_or_outline(name)[1] == 0


def test_two_copies_of_weights_are_compared_once_they_are_fetched(hub: Hub, folder: Path) -> None:
    """A file and shards of it."""
    remote = hub.add("owner/model", folder)
    whole = (remote / "model.safetensors").read_bytes()
    shard(remote)
    (remote / "model.safetensors").write_bytes(whole)
    assert read_or_outline("owner/model")[1] == stored(remote)
    assert hub.weight_bytes() <= most_of_outline(remote)


def test_a_config_that_cannot_be_read_is_refused_first(hub: Hub, folder: Path) -> None:
    remote = hub.add("owner/model", folder)
    (remote / "config.json").write_text('{"model_type": "abacus"}')
    with pytest.raises(InputError, match=r"^owner/model/config\.json: model_type is 'abacus'"):
        open_model("owner/model")
    assert hub.weight_bytes() <= most_of_outline(remote)


@pytest.mark.parametrize("damage", ["header", "shape", "cut"])
def test_weights_whose_header_cannot_be_read_are_fetched_and_then_refused(
    damage: str, hub: Hub, folder: Path
) -> None:
    remote = hub.add("owner/model", folder)
    path = remote / "model.safetensors"
    whole = path.read_bytes()
    broken = {
        "header": bytes([255] * 8) + whole[8:],
        "shape": whole.replace(b'"shape":[', b'"shape":{', 1),
        "cut": whole[:5],
    }
    path.write_bytes(broken[damage])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        open_model("owner/model")
    assert hub.weight_bytes() >= len(broken[damage])


def test_values_that_decide_something_are_fetched(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As of an adapter with copies of the base's matrices, which are compared with it."""
    remote = hub.add("owner/model", folder)

    def peeking(*arguments: Any, **options: Any) -> LoadedParts:
        loaded = read_model(*arguments, **options)
        next(iter(loaded.state.values())).read()
        return loaded

    monkeypatch.setattr(read, "read_model", peeking)
    _, missing = read_or_outline("owner/model")
    assert missing == 0
    assert hub.weight_bytes() >= stored(remote)
    assert "model.safetensors cannot be read in parts, so that all weights are downloaded" in caplog.text


def test_a_local_file_is_never_an_outline(folder: Path, tmp_path: Path) -> None:
    made = Path(shutil.copytree(folder, tmp_path / "made"))
    (made / "model.safetensors").write_text('{"a": ["F32", [2]]}')
    with pytest.raises(InputError, match=r"model\.safetensors is damaged or cut short"):
        read_or_outline(made)


class MakesFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_no_code_in_a_bin_is_run(hub: Hub, folder: Path, tmp_path: Path) -> None:
    remote = hub.add("owner/model", folder)
    (remote / "model.safetensors").unlink()
    torch.save({"a": MakesFolder(tmp_path / "made")}, remote / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"code in it is never run"):
        open_model("owner/model")
    assert not (tmp_path / "made").exists()
