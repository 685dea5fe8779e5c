"""A tokenizer of an export for the original code, opened by the transformers that this code asks for."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tokenizers import Tokenizer

from pumice.formats.export import export
from pumice.formats.import_ import import_model
from pumice.formats.llava.tokenizer import sentencepiece
from pumice.formats.pumice.folder import open_parts, save
from pumice.formats.text.sentencepiece import SentencePiece
from pumice.formats.text.tokenizer import MODEL
from pumice.storage.parts import LoadedParts

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / "build" / "transformers-4.37" / "bin" / "python"
TEXTS = [
    "What is in the picture? A dog runs.",
    "USER: \nWhat is it? ASSISTANT:",
    "USER: Who? ASSISTANT: A dog.</s>USER: Where? ASSISTANT:",
    "<|im_start|>user\nWho is it?<|im_end|>\n<|im_start|>assistant\n",
    "  two  spaces ",
    "naïve café cafe\u0301 漢字 🙂 12345 it's I'LL", "a\n\n\nb\tc", "system assistant human field",
]  # fmt: skip
SCRIPT = """
import json, sys
import transformers
from transformers import AutoTokenizer
folders, texts = json.load(sys.stdin)
found = {}
for folder in folders:
    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=False)
    ids = [tokenizer(text).input_ids for text in texts]
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    found[folder] = [type(tokenizer).__name__, len(tokenizer), ids, ends]
print(json.dumps([transformers.__version__, found]))
"""
CLASSES = {
    "CLIP + Llama, pad (LLaVA 1.5)": "LlamaTokenizer",
    "CLIP + Llama, linear, crop (LLaVA 1.0)": "LlamaTokenizer",
    "CLIP + Mistral, anyres (LLaVA 1.6)": "LlamaTokenizer",
    "CLIP + Mistral, pad": "LlamaTokenizer",
    "CLIP + Llama 3, pad": "PreTrainedTokenizerFast",
    "SigLIP + Qwen2, squash": "Qwen2Tokenizer",
    "LLaVA-OneVision, anyres_max": "Qwen2Tokenizer",
    "SigLIP + SmolLM2, pad": "PreTrainedTokenizerFast",
    "CLIP + Llama, LoRA": "LlamaTokenizer",
}


@pytest.fixture(scope="module")
def llama(models: ModuleType) -> LoadedParts:
    return models.tiny(models.ARCHITECTURES["CLIP + Llama, pad (LLaVA 1.5)"])


@pytest.fixture(scope="module")
def mistral(llama: LoadedParts, models: ModuleType, sentencepiece_file: Path) -> LoadedParts:
    """A tiny model with Mistral 7B's own tokenizer, and `<pad>` added behind it."""
    tokenizer = SentencePiece.read(sentencepiece_file).tokenizer("it")
    tokenizer.add_special_tokens(["<pad>"])
    tiny_model = models.tiny(models.Architecture(llama.config, lambda: tokenizer))
    return replace(tiny_model, sentencepiece=sentencepiece_file.read_bytes())


def opened(folders: list[Path]) -> dict[str, list[object]]:
    """What transformers 4.37 makes of each folder: the class, its size, ids of TEXTS, bos and eos."""
    if not PYTHON.is_file():
        pytest.skip(f"{PYTHON.parents[1]} is not there; make build/transformers-4.37/.done installs it")
    process = subprocess.run(
        [PYTHON, "-c", SCRIPT], input=json.dumps([[str(f) for f in folders], TEXTS]), capture_output=True,
        text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    version, results = json.loads(process.stdout)
    assert version.startswith("4.37.")
    return results


def test_transformers_4_37_cuts_text_alike(models: ModuleType, mistral: LoadedParts, tmp_path: Path) -> None:
    cases = {name: (models.tiny(models.ARCHITECTURES[name]), kind) for name, kind in CLASSES.items()}
    cases["source's tokenizer.model"] = (mistral, "LlamaTokenizer")
    cases["tokenizer.json alone"] = (replace(mistral, sentencepiece=None), "LlamaTokenizer")
    folders = {name: tmp_path / str(number) for number, name in enumerate(cases)}
    for name, (model, _) in cases.items():
        export(model, "llava", folders[name])
    results = opened(list(folders.values()))
    for name, (model, kind) in cases.items():
        tokenizer_kind, size, ids, (bos, eos) = results[str(folders[name])]
        assert tokenizer_kind == kind, name
        assert size == model.tokenizer.get_vocab_size(), name
        assert (bos, eos) == (model.config.bos_token_id, model.config.stop_token_ids[0]), name
        first = [] if model.config.bos_token_id is None else [model.config.bos_token_id]
        for text, cut in zip(TEXTS, ids, strict=True):
            if text.startswith(" ") and '"prepend_scheme":"first"' in model.tokenizer.to_str():
                continue  # `tokenizers` puts no second space before such a text, 4.37's class does
            own_ids = model.tokenizer.encode(text, add_special_tokens=False)
            assert cut == [*first, *own_ids.ids], f"{name}: {text!r} {own_ids.tokens}"


def test_every_architecture_that_is_exported_is_opened(models: ModuleType) -> None:
    from pumice.formats.export import refusal

    exported = {name for name, it in models.ARCHITECTURES.items() if refusal("llava", it.config) is None}
    assert exported == set(CLASSES)


def test_the_source_s_tokenizer_model_survives_import_and_export(
    mistral: LoadedParts, sentencepiece_file: Path, tmp_path: Path
) -> None:
    export(mistral, "hf", tmp_path / "hf")
    data = sentencepiece_file.read_bytes()
    (tmp_path / "hf" / MODEL).write_bytes(data)
    import_model(str(tmp_path / "hf"), tmp_path / "own")
    assert (tmp_path / "own" / MODEL).read_bytes() == data
    export(open_parts(tmp_path / "own"), "llava", tmp_path / "llava")
    assert (tmp_path / "llava" / MODEL).read_bytes() == data
    import_model(str(tmp_path / "llava"), tmp_path / "again")
    assert (tmp_path / "again" / MODEL).read_bytes() == data


def test_a_folder_without_one_does_not_keep_an_older_one_s(mistral: LoadedParts, tmp_path: Path) -> None:
    for data in (mistral.sentencepiece, None):
        save(
            tmp_path / "own", mistral.config, mistral.state, tokenizer=mistral.tokenizer.to_str(),
            sentencepiece=data,
        )  # fmt: skip
        assert (tmp_path / "own" / MODEL).exists() == (data is not None)


@pytest.mark.parametrize("data", [b"\x00\x01damaged", b"", b"another's"])
def test_a_tokenizer_model_of_something_else_is_not_taken(
    llama: LoadedParts, mistral: LoadedParts, data: bytes
) -> None:
    other = mistral.sentencepiece if data == b"another's" else data
    written = sentencepiece(replace(llama, sentencepiece=other))
    assert written == sentencepiece(llama) is not None


def test_what_sentencepiece_did_not_make_is_exported_with_a_note(llama: LoadedParts, tmp_path: Path) -> None:
    values = json.loads(llama.tokenizer.to_str())
    values["model"]["merges"] = values["model"]["merges"][:-1]
    other = replace(llama, tokenizer=Tokenizer.from_str(json.dumps(values)))
    notes = export(other, "llava", tmp_path / "out").notes
    assert any("no SentencePiece model" in note for note in notes)
    assert not (tmp_path / "out" / MODEL).exists()
    merges = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["merges"]
    assert merges and all(isinstance(merge, str) for merge in merges)


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("normalizer", {"normalizer": None}),  # Qwen2's class would still normalize to NFC
        ("normalizer", {"normalizer": {"type": "Lowercase"}}),
        ("model", {"end_of_word_suffix": "</w>"}),
        ("bos_token_id", {}),
    ],
)
def test_a_tokenizer_that_only_splits_words_as_qwen2_is_opened_from_tokenizer_json(
    models: ModuleType, tmp_path: Path, part: str, values: dict[str, Any]
) -> None:
    model = models.tiny(models.ARCHITECTURES["SigLIP + Qwen2, squash"])
    tokenizer = json.loads(model.tokenizer.to_str())
    (tokenizer["model"] if part == "model" else tokenizer).update(values)
    other = replace(model, tokenizer=Tokenizer.from_str(json.dumps(tokenizer)))
    if part == "bos_token_id":
        other = replace(other, config=replace(model.config, bos_token_id=tokenizer["added_tokens"][0]["id"]))
    export(other, "llava", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not (tmp_path / "out" / "vocab.json").exists()


def test_a_byte_level_tokenizer_without_nfc_cuts_alike(models: ModuleType, tmp_path: Path) -> None:
    model = models.tiny(models.ARCHITECTURES["SigLIP + Qwen2, squash"])
    values = json.loads(model.tokenizer.to_str()) | {"normalizer": None}
    other = replace(model, tokenizer=Tokenizer.from_str(json.dumps(values)))
    export(other, "llava", tmp_path / "out")
    [(_, _, ids, _)] = opened([tmp_path / "out"]).values()
    assert ids == [other.tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert ids != [model.tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
