"""Our folder: what goes in comes out, everything wrong is named, nothing is written by halves."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor

from pumice.config import DecoderConfig, ImagePolicy, ModelConfig
from pumice.errors import InputError
from pumice.formats import names as tensor_names
from pumice.formats.pumice import folder as folders
from pumice.formats.pumice.folder import check, open_parts, replacing, save
from pumice.storage import download

DECODER = DecoderConfig(
    vocab_size=266, width=256, depth=2, heads=4, kv_heads=2, head_dim=64, mlp_width=512, tied_head=True
)
CONFIG = ModelConfig(decoder=DECODER)
WORDS = Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")).to_str()
STATE = {
    "connector.layers.0.weight": torch.arange(6.0).view(2, 3),
    "decoder.norm.weight": torch.ones(4, dtype=torch.bfloat16),
    "tower.stem.norm.bias": torch.zeros(3, dtype=torch.float16),
}
SHAPES = {name: tuple(tensor.shape) for name, tensor in STATE.items()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save(tmp_path / "m", CONFIG, STATE, tokenizer=WORDS, provenance={"data": "é"})
    return tmp_path / "m"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_round_trip_to_the_byte(model: Path, tmp_path: Path) -> None:
    loaded = open_parts(model)
    check(loaded.state, SHAPES, str(model))
    assert loaded.config == CONFIG
    assert loaded.provenance == {"data": "é"}
    assert loaded.parts == {}
    assert loaded.tokenizer.get_vocab() == {"a": 0, "b": 1}
    assert loaded.state.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert loaded.state[name].dtype == tensor.dtype
        assert torch.equal(loaded.state[name].read(), tensor)
    save(tmp_path / "again", loaded.config, loaded.state, tokenizer=WORDS, provenance=loaded.provenance)
    assert contents(tmp_path / "again") == contents(model)
    assert sorted(contents(model)) == [
        "config.json",
        "model.safetensors",
        "provenance.json",
        "tokenizer.json",
    ]
    assert (model / "tokenizer.json").read_text(encoding="utf-8") == WORDS


def test_transposed_and_shared_storage_is_written(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).view(2, 3)
    save(tmp_path / "m", CONFIG, {"a": tensor.T, "b": tensor[1]}, tokenizer=WORDS)
    state = open_parts(tmp_path / "m").state
    assert torch.equal(state["a"].read(), tensor.T)
    assert torch.equal(state["b"].read(), tensor[1])


def test_replacing_keeps_files_that_are_not_ours(model: Path) -> None:
    (model / "README.md").write_text("card")
    (model / "parts.json").write_text("{}")
    save(model, CONFIG, {"x": torch.zeros(1)}, tokenizer=WORDS)
    assert (model / "README.md").read_text() == "card"
    assert not (model / "parts.json").exists()
    assert open_parts(model).state.keys() == {"x"}
    assert [p.name for p in model.parent.iterdir()] == ["m"]


@pytest.mark.parametrize("fails", ["write_json", "sync", "write_weights"])
def test_a_failure_leaves_the_old_folder(model: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    before = contents(model)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folders, fails, stop)
    with pytest.raises(KeyboardInterrupt):
        save(model, CONFIG, {"x": torch.zeros(1)}, tokenizer=WORDS)
    assert contents(model) == before
    assert [p.name for p in model.parent.iterdir()] == ["m"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failure_of_the_swap_leaves_the_old_folder(
    model: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    before, rename, calls = contents(model), Path.rename, []

    def fail_at(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == failing:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_at)
    with pytest.raises(KeyboardInterrupt):
        save(model, CONFIG, {"x": torch.zeros(1)}, tokenizer=WORDS)
    assert contents(model) == before
    assert [p.name for p in model.parent.iterdir()] == ["m"]


def test_a_new_folder_is_not_there_until_it_is_whole(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), replacing(tmp_path / "deep" / "m") as fresh:
        (fresh / "half").touch()
        raise OSError("full")
    assert list((tmp_path / "deep").iterdir()) == []


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """Not what another process still writes, and not an old model that was about to be replaced."""
    code = (
        "import os, sys\n"
        "from pumice.formats.pumice.folder import replacing\n"
        "with replacing(sys.argv[1]) as fresh:\n"
        "    (fresh / 'half').touch()\n"
        "    os._exit(1)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "m"], check=False)
    [left] = tmp_path.iterdir()
    assert (left / "new" / "half").is_file()
    with replacing(tmp_path / "m"):
        assert not left.exists()
        with replacing(tmp_path / "m"):
            assert len(list(tmp_path.iterdir())) == 2
    subprocess.run([sys.executable, "-c", code, tmp_path / "m"], check=False)
    [left] = tmp_path.glob(".m.*")
    (left / "old").mkdir()
    with replacing(tmp_path / "m"):
        pass
    assert sorted(tmp_path.iterdir()) == [left, tmp_path / "m"]


def test_a_disk_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a drive of Windows, which is its own parent."""
    looks = itertools.count()

    def exists(_: Path) -> bool:
        assert next(looks) < 100
        return False

    def no_drive(*_: Any, **__: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(Path, "exists", exists)
        elsewhere.setattr(Path, "mkdir", no_drive)
        with pytest.raises(InputError, match=r"cannot write the model folder .*: No such file or directory"):
            save(tmp_path / "m", CONFIG, STATE, tokenizer=WORDS)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "m").touch()
    with pytest.raises(InputError, match="a file of that name is in the way"):
        save(tmp_path / "m", CONFIG, STATE, tokenizer=WORDS)
    with pytest.raises(InputError, match=r"cannot write the model folder .*: a file '.*m' is in the way"):
        save(tmp_path / "m" / "n", CONFIG, STATE, tokenizer=WORDS)
    with pytest.raises(InputError, match="m is a file, not a model folder"):
        open_parts(tmp_path / "m")
    with pytest.raises(InputError, match="none does not exist"):
        open_parts(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"connector.layers.0.weight": None}, r"missing: connector\.layers\.0\.weight$"),
        ({"odd": torch.zeros(1)}, "extra: odd$"),
        (
            {"decoder.norm.weight": torch.zeros(5, 2)},
            r"wrongly shaped: decoder\.norm\.weight is \[5, 2\] instead of \[4\]$",
        ),
        (
            {"decoder.norm.weight": None, "odd": torch.zeros(1)},
            r"missing: decoder\.norm\.weight; extra: odd$",
        ),
    ],
)
def test_check_names_every_tensor(change: dict[str, Tensor | None], message: str) -> None:
    state = {name: tensor for name, tensor in {**STATE, **change}.items() if tensor is not None}
    with pytest.raises(InputError, match=f"^the tensors in here do not fit its config.json: {message}"):
        check(state, SHAPES, "here")


def test_counters_of_batches_count_on_neither_side(tmp_path: Path) -> None:
    counter = {"tower.stem.norm.num_batches_tracked": torch.tensor(3)}
    check(STATE, SHAPES | {name: () for name in counter}, "here")
    check(STATE | counter, SHAPES, "here")
    save(tmp_path / "m", CONFIG, STATE | counter, tokenizer=WORDS)
    assert open_parts(tmp_path / "m").state.keys() == STATE.keys()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, r"config\.json is missing; the folder is not a whole Pumice model"),
        ("tokenizer.json", None, r"tokenizer\.json is missing"),
        ("model.safetensors", None, r"model\.safetensors is missing"),
        ("provenance.json", None, r"provenance\.json is missing"),
        ("config.json", b"{", r"config\.json is not JSON"),
        ("config.json", b"[]", r"config\.json should hold a JSON object, not a list"),
        ("config.json", b"\xff", r"config\.json cannot be read"),
        ("config.json", b'{"pumice_format": 9}', "has pumice_format 9, this version reads 1"),
        ("tokenizer.json", b"{}", r"tokenizer\.json is not a tokenizer\.json"),
        ("model.safetensors", b"", r"model\.safetensors is damaged or cut short"),
        ("model.safetensors", 0.9, r"model\.safetensors is damaged or cut short"),
        ("parts.json", b'{"tower": "x"}', r"parts\.json: tower should be"),
        ("parts.json", b'{"tower": {"wheel": "x", "sha256": ""}}', "there is no part called 'x'"),
    ],
)
def test_each_file_is_read_strictly(
    model: Path, name: str, content: bytes | float | None, message: str
) -> None:
    path = model / name
    if content is None:
        path.unlink()
    elif isinstance(content, float):
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * content)])
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        open_parts(model)
    assert "\n" not in str(caught.value)


@pytest.fixture
def wheels(tmp_path: Path, write_gguf: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Both wheels, tiny, in the cache; returns the state that they bring."""
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path / "cache"))
    paths = {}
    for name, part in download.WHEELS.items():
        part.folder.mkdir(parents=True)
        paths[name] = part.folder / Path(part.member).name
    tower = {name: torch.full((1,), float(i)) for i, name in enumerate(tensor_names.efficientnet_lite(2))}
    torch.save(tower, paths["efficientnet-lite2"])
    decoder = write_gguf(paths["smollm2-135m-instruct"], DECODER, quantised="Q8_0")
    for name, part in download.WHEELS.items():
        stamp = {"wheel_sha256": part.sha256, "size": paths[name].stat().st_size}
        (part.folder / "stamp.json").write_text(json.dumps(stamp))
    renamed = tensor_names.convert(tower, tensor_names.efficientnet_lite(2))
    return {f"tower.{n}": t for n, t in renamed.items()} | {f"decoder.{n}": t for n, t in decoder.items()}


BASE = {"tower": "efficientnet-lite2", "decoder": "smollm2-135m-instruct"}
TRAINED = {
    "connector.layers.0.weight": torch.ones(2, 2, dtype=torch.float16),
    "decoder.blocks.1.attention.q.lora_a": torch.ones(1, 256, dtype=torch.float16),
    "decoder.blocks.1.attention.q.lora_b": torch.ones(256, 1, dtype=torch.float16),
}


def test_parts_are_left_out_and_filled_in(tmp_path: Path, wheels: dict[str, Tensor]) -> None:
    save(tmp_path / "m", CONFIG, wheels | TRAINED, parts=BASE)
    from safetensors.torch import load_file

    assert load_file(tmp_path / "m" / "model.safetensors").keys() == TRAINED.keys()
    assert not (tmp_path / "m" / "tokenizer.json").exists()
    loaded = open_parts(tmp_path / "m")
    assert loaded.parts == BASE
    assert loaded.state.keys() == wheels.keys() | TRAINED.keys()
    assert all(torch.equal(loaded.state[name].read(), tensor) for name, tensor in (wheels | TRAINED).items())
    assert loaded.tokenizer.encode("hello").tokens == ["hello"]
    half = loaded.state["decoder.embed.weight"].read(torch.bfloat16)
    assert torch.equal(half, wheels["decoder.embed.weight"].to(torch.bfloat16))


@pytest.mark.usefixtures("wheels")
def test_another_base_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m" / "parts.json"
    save(tmp_path / "m", CONFIG, TRAINED, parts=BASE)
    pinned = download.WHEELS["efficientnet-lite2"].sha256
    path.write_text(path.read_text().replace(pinned, "f" * 64))
    with pytest.raises(InputError, match=f"trained on a tower with SHA-256 {'f' * 64}, but .* is {pinned}"):
        open_parts(tmp_path / "m")
    other = dataclasses.replace(CONFIG, decoder=dataclasses.replace(DECODER, rope_theta=5.0, context=99))
    save(tmp_path / "m", other, TRAINED, parts=BASE)
    with pytest.raises(
        InputError, match=r"not the decoder that parts\.json names: rope_base 5\.0 instead of 1"
    ):
        open_parts(tmp_path / "m")


def test_a_tensor_is_not_in_two_places(tmp_path: Path, wheels: dict[str, Tensor]) -> None:
    save(tmp_path / "m", CONFIG, TRAINED, parts=BASE)
    save(tmp_path / "full", CONFIG, wheels | TRAINED, tokenizer=WORDS)
    shutil.copy(tmp_path / "full" / "model.safetensors", tmp_path / "m")
    with pytest.raises(InputError, match=r"holds what parts\.json takes from a wheel: tower\."):
        open_parts(tmp_path / "m")


def test_wrong_parts_are_refused_before_writing(tmp_path: Path) -> None:
    for parts_given, message in (
        (
            {"connector": "efficientnet-lite2"},
            "no part 'connector' to take from a wheel; use one of tower, decoder",
        ),
        ({"tower": "lite9"}, "there is no part called 'lite9'"),
    ):
        with pytest.raises(InputError, match=message):
            save(tmp_path / "m", CONFIG, STATE, tokenizer=WORDS, parts=parts_given)
    with pytest.raises(InputError, match="would have no tokenizer"):
        save(tmp_path / "m", CONFIG, STATE, parts={"tower": "efficientnet-lite2"})
    assert list(tmp_path.iterdir()) == []


def test_an_older_folder_of_llava_onevision_shows_squares_and_says_so(tmp_path: Path) -> None:
    tiles = ImagePolicy("anyres", pinpoints=((256, 512), (512, 512)), max_tiles=9)
    for number, policy in enumerate((tiles, dataclasses.replace(tiles, max_tiles=None, several="tiles"))):
        folder = tmp_path / str(number)
        save(folder, dataclasses.replace(CONFIG, image=policy), STATE, tokenizer=WORDS)
        assert open_parts(folder).notes == ()
        values = json.loads((folder / "config.json").read_text())
        del values["image"]["several"]
        (folder / "config.json").write_text(json.dumps(values))
        opened = open_parts(folder)
        assert opened.config.image == policy
        assert len(opened.notes) == (number == 0)  # LLaVA-NeXT's tiles are what they were
    assert "each of several pictures is shown as one padded square" in open_parts(tmp_path / "0").notes[0]
