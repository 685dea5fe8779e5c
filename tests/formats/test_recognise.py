"""What a folder is: by its contents, whatever it is called."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pumice.errors import InputError
from pumice.formats.read import find_model, read_model
from pumice.formats.recognise import FormatKind, recognise


def folder(path: Path, **files: Any) -> Path:
    path.mkdir()
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"config": {"pumice_format": 1}}, FormatKind.OWN),
        ({"config": {"model_type": "llava", "text_config": {}}}, FormatKind.HF),
        ({"config": {"model_type": "llava_next", "vision_config": {}}}, FormatKind.HF),
        ({"config": {"model_type": "llava", "mm_vision_tower": "x"}}, FormatKind.ORIGINAL),
        (
            {"config": {"model_type": "llava_llama", "mm_vision_tower": "x"}, "adapter_config": {}},
            FormatKind.ORIGINAL,
        ),
        ({"adapter_config": {}}, FormatKind.ADAPTER),
        ({"config": {"model_type": "llama"}, "adapter_config": {}}, FormatKind.ADAPTER),
        ({"config": {"model_type": "qwen3"}}, FormatKind.LLM),
        ({"config": {"model_type": "clip", "text_config": {}, "vision_config": {}}}, FormatKind.TOWER),
        ({"config": {"model_type": "siglip_vision_model"}}, FormatKind.TOWER),
    ],
)
def test_contents_decide(tmp_path: Path, files: dict[str, Any], kind: FormatKind) -> None:
    assert recognise(folder(tmp_path / "llava-v1.5-7b-hf-lora", **files)) is kind


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"is no whole model: it holds no config\.json"),
        ({"config": {"model_type": "bert"}}, "model_type is 'bert', which cannot be read; known are llava"),
        ({"config": {}}, "model_type is '', which cannot be read"),
        ({"config": {"model_type": "llava"}}, "has neither text_config nor mm_vision_tower"),
        ({"config": {"model_type": 3}}, "model_type should be text, not 3"),
    ],
)
def test_nothing_that_is_known(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        recognise(folder(tmp_path / "m", **files))


def test_a_folder_of_pictures_is_told_with_what_it_holds(tmp_path: Path) -> None:
    for name in (".hidden", *"01234"):
        (tmp_path / f"{name}.jpg").touch()
    with pytest.raises(
        InputError, match=r"it holds 0\.jpg, 1\.jpg, 2\.jpg and 3 more, but no config\.json.* train"
    ):
        recognise(tmp_path)
    for name, hint in (("0.jpg", True), ("rows.csv", True), ("weights.bin", False)):
        (tmp_path / name).touch()
        with pytest.raises(InputError, match="is a file, but not GGUF; ") as refused:
            recognise(tmp_path / name)
        assert ("are for `pumice data check` and `pumice train`" in str(refused.value)) is hint


def test_gguf_by_its_first_bytes(tmp_path: Path) -> None:
    files = folder(tmp_path / "m")
    (files / "a.gguf").write_bytes(b"GGUF")
    (files / "b.txt").write_bytes(b"GGUF")
    assert recognise(files / "b.txt") is FormatKind.GGUF
    assert recognise(files) is FormatKind.GGUF
    (files / "c.gguf").touch()  # a pair; its reader says which half is missing
    assert recognise(files) is FormatKind.GGUF


def test_a_bare_tower_and_a_bare_llm(parts_of: tuple[Path, Path], tmp_path: Path) -> None:
    tower, llm = parts_of
    with pytest.raises(InputError, match="is a bare vision tower, which says nothing by itself; join it"):
        read_model(tower)
    loaded = read_model(llm)
    assert loaded.config.vision.kind == "none"
    assert loaded.notes == ("it has no vision tower and answers without pictures",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tower": "x"}, "is a LLaVA of transformers, which takes no other vision tower"),
        ({"base": "x"}, "is a LLaVA of transformers, which needs no base"),
        ({"template": "v7"}, "unknown template 'v7'"),
    ],
)
def test_options_that_a_source_does_not_take(
    llava: Callable[[str], Path], options: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_model(llava("llava"), **options)


def test_names_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llava: Callable[[str], Path]
) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--owner--tiny"
    (repository / "snapshots").mkdir(parents=True)
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.symlink_to(llava("llava"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_model("owner/tiny") == snapshot
    assert read_model("owner/tiny").sources["model"] == ("owner/tiny", snapshot)
    assert find_model("owner/tiny@main") == snapshot
    with pytest.raises(InputError, match="owner/other is not in the hub's cache and cannot be fetched"):
        find_model("owner/other")
